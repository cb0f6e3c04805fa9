"""Names files that data hold twice under other names, whose documents count twice."""

from __future__ import annotations

import os
from collections import Counter

from recipes.data.config import DataConfig
from recipes.data.same_files import repeated_files
from recipes.data.sources import SHOWN, resolve


def describe_repeats(cfg: DataConfig) -> str | None:
    """Describes the files that are read once more, by a link or a copy; None where there are none.

    Of a blend, all sources count as one. Python's own library is taken as it is.

    Args:
        cfg: Data whose paths are right.
    """
    sources = [resolve(own) for own in cfg.sources()]
    paths = [path for found in sources if found.kind != "stdlib" for path in found.of_tokens]
    # A file that several sources of a blend name is the same as itself.
    times = Counter(paths)
    repeated = [(path, path) for path, count in times.items() if count > 1]
    repeated += repeated_files(times).items()
    if not repeated:
        return None
    named = [_name(str(path), str(earlier)) for path, earlier in repeated[:SHOWN]]
    more = [f"{len(repeated) - SHOWN} more"] if len(repeated) > SHOWN else []
    what = f"{len(repeated)} {'file is' if len(repeated) == 1 else 'files are'}"
    return (
        f"warning: {what} in the data twice, by link or content, and counted twice: {'; '.join(named + more)}"
    )


def _name(path: str, earlier: str) -> str:
    if path == earlier:
        return f"{path} in two sources"
    same = os.path.realpath(path) == os.path.realpath(earlier)
    return f"{path} is {'a link to' if same else 'the same as'} {earlier}"
