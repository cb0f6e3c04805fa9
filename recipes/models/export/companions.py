"""Files that accompany a checkpoint's weights and config: found, checked, copied.

A link that leaves the folder is not followed: what it shows would be published with the model.
"""

from __future__ import annotations

import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from moe.errors import Mistake, ModelError
from recipes.runtime.user_json import LARGEST_FILE

_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "*.model",
    "tekken.json",
)

_MEND = "Put the file that the checkpoint was published with into the folder, or delete it."


def check_companions(path: str, option: str = "dense", *, code: bool = False) -> list[Mistake]:
    """Finds the files of a folder that an export would copy and must not.

    Args:
        path: The folder.
        option: Config path or flag that names it.
        code: Whether the model's code is copied too.
    """
    folder = Path(path).expanduser()
    return [
        Mistake(option, path, f"its {file.name} {rule}", _MEND)
        for file in _found(folder, code)
        if (rule := _refused(folder, file)) is not None
    ]


def copy_companions(source: Path, folder: Path, *, code: bool = False) -> None:
    """Copies the tokenizer and other files that accompany a checkpoint.

    Args:
        source: The checkpoint.
        folder: Where to.
        code: Whether to copy the model's code too, which somebody has trusted.

    Raises:
        ModelError: One of them is a link that leaves the folder.
    """
    for file in _found(source, code):
        if (rule := _refused(source, file)) is not None:
            raise ModelError.one("dense", str(file), f"it {rule}", _MEND)
        if file.is_file():
            shutil.copyfile(file, folder / file.name)


def _found(folder: Path, code: bool) -> Iterator[Path]:
    # transformers looks for code beside config.json, and for what that code imports.
    for pattern in (*_PATTERNS, *(["*.py"] if code else [])):
        yield from sorted(folder.glob(pattern))


def _refused(folder: Path, file: Path) -> str | None:
    """Returns why a file must not be copied; None where it may be."""
    try:
        found = file.stat()
    except OSError:
        return "is a link to nothing"
    if stat.S_ISDIR(found.st_mode):
        return None
    if not stat.S_ISREG(found.st_mode):
        return "is no regular file"
    if found.st_size > LARGEST_FILE:
        return f"holds {found.st_size} bytes, far more than such a file has"
    home = folder.resolve()
    # The hub's cache keeps a snapshot's files beside it, under models--NAME/blobs.
    allowed = [home, *([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])]
    target = file.resolve()
    if any(target.is_relative_to(place) for place in allowed):
        return None
    return f"is a link out of the folder, to {target}"
