"""Inventory of a run's checkpoints: verifies, finds and deletes them, and checks for room on the disk."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist

from moe.errors import CheckpointError, ConfigError, DiskError
from recipes.checkpoint.manifest import (
    MANIFEST,
    TEMPORARY,
    all_at_once,
    check_file,
    parse_manifest,
    parse_step,
    read_manifest,
    read_state,
    require_own,
)
from recipes.checkpoint.shard_layout import GlobalTensor, global_shape, local_memory
from recipes.runtime.ranks import Ranks

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """The newest complete checkpoint, and the folders that were rejected before it.

    Attributes:
        path: Its folder; None if there is no complete one.
        rejected: Newer folders that are damaged, unfinished, misnamed or of another run, with reasons.
    """

    path: Path | None
    rejected: list[tuple[Path, str]]

    def lines(self) -> list[str]:
        """Returns a line for each folder that was rejected."""
        return [f"passing over the checkpoint {path}: {reason}" for path, reason in self.rejected]


def verify_checkpoint(
    path: str | Path, *, run: str | None = None, group: dist.ProcessGroup | None = None
) -> None:
    """Reads all of a checkpoint and compares it with its manifest; the ranks share the work. Collective.

    Args:
        path: Its folder.
        run: Id of the run that it must belong to; None for any.
        group: The ranks that take part; None is all of them, or this process alone.

    Raises:
        CheckpointError: It is missing, incomplete, damaged, named as another step, or of another run; the
            message names the file and what is wrong.
    """
    folder, ranks = Path(path), Ranks(group)

    def check() -> None:
        manifest = read_manifest(folder)
        require_own(folder, manifest, run)
        mine = sorted(manifest.files)[ranks.rank :: ranks.size]
        all_at_once(partial(check_file, folder / name, manifest.files[name]) for name in mine)

    ranks.together(f"verifying {folder}", check)


def find_checkpoint(
    root: str | Path, *, run: str | None = None, group: dist.ProcessGroup | None = None
) -> Found:
    """Finds a run's checkpoint of the highest step that is complete and undamaged. Collective.

    Args:
        root: The run's ``checkpoints`` folder; it need not exist.
        run: Id of the run; None for any.
        group: The ranks that take part; None is all of them, or this process alone.
    """
    root, ranks = Path(root), Ranks(group)
    names = ranks.together(f"listing {root}", lambda: _list(root) if ranks.is_rank0 else [])[0]
    rejected: list[tuple[Path, str]] = []
    for name in names:
        path = root / name
        if name.startswith(TEMPORARY):
            rejected.append((path, "the save was interrupted before it was complete"))
            continue
        try:
            verify_checkpoint(path, run=run, group=group)
        except CheckpointError as error:
            reasons = (f"{Path(m.path).name}: {m.rule} (it is {m.value})" for m in error.mistakes)
            rejected.append((path, "; ".join(reasons)))
            continue
        return Found(path, rejected)
    return Found(None, rejected)


def _list(root: Path) -> list[str]:
    """Lists the names of all checkpoints, finished or not, in descending order of their steps."""
    steps = {}
    for path in root.iterdir() if root.is_dir() else ():
        step = parse_step(path.name.removeprefix(TEMPORARY))
        if step is not None:
            steps[path.name] = step
    return sorted(steps, key=lambda name: (steps[name], name), reverse=True)


@dataclass(frozen=True)
class Retention:
    """Rule by which checkpoints are kept once a newer one is complete.

    Attributes:
        last: Number to keep: the one just written and the ``last - 1`` others of the highest steps. None
            keeps all.
        best: Key of a number in the state, such as ``val_loss``: the checkpoint with the lowest one is kept
            too, the earliest of several. None for no such rule.
    """

    last: int | None = None
    best: str | None = None

    def __post_init__(self) -> None:
        if self.last is not None and self.last < 1:
            raise ConfigError.one(
                "keep_last", self.last, "would delete the checkpoint just written", "Give 1 or more."
            )


def own_checkpoints(root: Path, run: str | None = None) -> list[Path]:
    """Returns the folders whose manifests have the step of their name and are of the run, newest first.

    Their other files are not looked at.
    """
    return [path for name in _list(root) if is_own(path := root / name, run)]


def is_own(folder: Path, run: str | None) -> bool:
    """Returns True if a folder's manifest can be read, has the step of its name, and is of the run."""
    if parse_step(folder.name) is None:
        return False
    try:
        require_own(folder, parse_manifest(folder), run)
    except CheckpointError:
        return False
    return True


def retain(root: Path, newest: Path, keep: Retention, run: str | None = None) -> None:
    """Deletes checkpoints that the rule does not keep. Call it once ``newest`` is complete under its name.

    Nothing is deleted for its name alone: what has no readable manifest, or that of another step or run,
    stays. A failure is only logged, since the new checkpoint is safe.
    """
    if keep.last is None:
        return
    complete = [path for path in own_checkpoints(root, run) if path != newest]
    best = None if keep.best is None else best_checkpoint([newest, *complete], keep.best)
    for path in complete[keep.last - 1 :]:
        if path == best:
            continue
        # Under its temporary name it no longer counts as a checkpoint, and the next save removes what is
        # left.
        doomed = root / f"{TEMPORARY}deleted-{path.name}"
        try:
            path.rename(doomed)
            (doomed / MANIFEST).unlink()
            shutil.rmtree(doomed)
        except OSError as error:
            _LOG.warning("could not delete the old checkpoint %s: %s", path, error)


def best_checkpoint(folders: Sequence[Path], key: str) -> Path | None:
    """Returns the earliest folder with the lowest number under ``key`` in its state, or None."""
    numbers = ((_number(path, key), parse_step(path.name) or 0, path) for path in folders)
    found = [(value, step, path) for value, step, path in numbers if value is not None]
    return min(found)[2] if found else None


def _number(folder: Path, key: str) -> float | None:
    try:
        value = read_state(folder).get(key)
    except CheckpointError:
        return None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def checkpoint_bytes(tensors: Mapping[str, GlobalTensor]) -> int:
    """Computes the bytes of one checkpoint of ``tensors`` over all ranks, without the few KiB of JSON."""
    return sum(
        math.prod(global_shape(value)) * local_memory(value)[0].dtype.itemsize for value in tensors.values()
    )


def require_space(path: str | Path, num_bytes: int, what: str) -> None:
    """Checks that the disk that will hold ``path`` has room, before a run starts to write.

    Args:
        path: The folder to be written; it need not exist yet.
        num_bytes: Bytes needed.
        what: Subject of the message, as in "3 checkpoints of 12.1 GiB".

    Raises:
        DiskError: Fewer than ``num_bytes`` are free for this user there.
    """
    path = Path(path)
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free >= num_bytes:
        return
    rule = f"{what} needs {readable(num_bytes)}, but only {readable(free)} are free on the disk of {existing}"
    raise DiskError.one(
        "path", str(path), rule, "Free some space there, keep fewer, or write to another disk."
    )


def readable(num_bytes: int) -> str:
    """Formats a number of bytes, as in "12.1 GiB"."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} bytes"
