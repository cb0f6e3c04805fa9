"""Verifies checkpoints, and finds the newest one that is whole."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist

from moe.errors import CheckpointError
from recipes.checkpoint.manifest import all_at_once, check_file, read_manifest
from recipes.checkpoint.names import TEMPORARY, parse_step
from recipes.runtime.ranks import Ranks


@dataclass(frozen=True)
class Found:
    """The newest complete checkpoint, and what was passed over on the way to it.

    Attributes:
        path: Its folder, or None when there is no complete one.
        rejected: Newer folders that are damaged or unfinished, each with the reason.
    """

    path: Path | None
    rejected: list[tuple[Path, str]]


def verify_checkpoint(path: str | Path, *, group: dist.ProcessGroup | None = None) -> None:
    """Reads all of a checkpoint and compares it with its manifest; the ranks share the work. Collective.

    Raises:
        CheckpointError: It is missing, incomplete or damaged; the message names the file and what is wrong.
    """
    folder, ranks = Path(path), Ranks(group)

    def check() -> None:
        manifest = read_manifest(folder)
        mine = sorted(manifest.files)[ranks.rank :: ranks.size]
        all_at_once(partial(check_file, folder / name, manifest.files[name]) for name in mine)

    ranks.together(f"verifying {folder}", check)


def find_checkpoint(root: str | Path, *, group: dist.ProcessGroup | None = None) -> Found:
    """Finds the checkpoint of the highest step that is complete and undamaged. Collective.

    Args:
        root: The run's ``checkpoints`` folder; it need not exist.
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
            verify_checkpoint(path, group=group)
        except CheckpointError as error:
            reasons = (f"{Path(m.path).name}: {m.rule} (it is {m.value})" for m in error.mistakes)
            rejected.append((path, "; ".join(reasons)))
            continue
        return Found(path, rejected)
    return Found(None, rejected)


def _list(root: Path) -> list[str]:
    """Names of the checkpoints, finished or not, in descending order of their steps."""
    steps = {}
    for path in root.iterdir() if root.is_dir() else ():
        step = parse_step(path.name.removeprefix(TEMPORARY))
        if step is not None:
            steps[path.name] = step
    return sorted(steps, key=lambda name: (steps[name], name), reverse=True)
