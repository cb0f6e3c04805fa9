"""Which checkpoints are kept once a newer one is complete."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe.errors import ConfigError
from recipes.checkpoint.names import MANIFEST, STATE, TEMPORARY, parse_step

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retention:
    """What is kept.

    Attributes:
        last: The one just written and the ``last - 1`` others of the highest steps; None keeps all.
        best: Key of a number in the state, as ``val_loss``: the checkpoint of the lowest one is kept besides,
            of several the earliest. None for no such rule.
    """

    last: int | None = None
    best: str | None = None

    def __post_init__(self) -> None:
        if self.last is not None and self.last < 1:
            raise ConfigError.one(
                "keep_last", self.last, "would delete the checkpoint just written", "Give 1 or more."
            )


def retain(root: Path, newest: Path, keep: Retention) -> None:
    """Deletes what is not kept. Call it when ``newest`` is complete under its name.

    A failure is only logged: the new checkpoint is safe.
    """
    if keep.last is None:
        return
    complete = [
        path
        for path in root.iterdir()
        if parse_step(path.name) is not None and path != newest and (path / MANIFEST).is_file()
    ]
    complete.sort(key=lambda path: parse_step(path.name) or 0, reverse=True)
    best = None if keep.best is None else best_checkpoint([newest, *complete], keep.best)
    for path in complete[keep.last - 1 :]:
        if path == best:
            continue
        # Under its temporary name it is no checkpoint any more, and the next save removes what is left of it.
        doomed = root / f"{TEMPORARY}deleted-{path.name}"
        try:
            path.rename(doomed)
            (doomed / MANIFEST).unlink()
            shutil.rmtree(doomed)
        except OSError as error:
            _LOG.warning("could not delete the old checkpoint %s: %s", path, error)


def best_checkpoint(folders: Sequence[Path], key: str) -> Path | None:
    """The folder whose state has the lowest number under ``key``, of several the earliest; None of none."""
    numbers = ((_number(path, key), parse_step(path.name) or 0, path) for path in folders)
    found = [(value, step, path) for value, step, path in numbers if value is not None]
    return min(found)[2] if found else None


def _number(folder: Path, key: str) -> float | None:
    try:
        value = json.loads((folder / STATE).read_bytes()).get(key)
    except (OSError, ValueError):
        return None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
