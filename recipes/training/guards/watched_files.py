"""Detection of changes of the files that training reads.

The files are mapped into memory: one that shrinks kills a process without a message when its pages are read,
and one that is written to changes the samples.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from torch.distributed import ProcessGroup

from moe.errors import DataError, Mistake
from recipes.runtime.ranks import Ranks

_REMEDY = "Put it back as it was and set resume=auto, or start a new run with the new data."
_SHOWN = 8


@dataclass(frozen=True)
class _Seen:
    size: int
    changed_ns: int
    inode: int


@dataclass
class WatchedFiles:
    """Files whose size, time and inode are compared with those at the beginning.

    Attributes:
        paths: Paths of the files.
    """

    paths: Sequence[Path]
    _before: dict[Path, _Seen | None] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._before = {path: _look(path) for path in self.paths}

    def changes(self) -> list[Mistake]:
        """Returns the changes since the beginning; it reads no file."""
        pairs = ((path, before, _look(path)) for path, before in self._before.items())
        return [
            Mistake("data file", str(path), _describe(before, now), _REMEDY)
            for path, before, now in pairs
            if before is not None and now != before
        ]


def changed_everywhere(own: Sequence[Mistake], group: ProcessGroup | None) -> DataError:
    """Returns the error that every rank raises if at least one has found a change. Collective."""
    found = Ranks(group).gather([(str(m.value), m.rule) for m in own])
    named: dict[tuple[str, str], list[int]] = {}
    for rank, mistakes in enumerate(found):
        for value, rule in mistakes:
            named.setdefault((value, rule), []).append(rank)
    all_ranks = len(found)
    return DataError(
        [
            Mistake("data file", value, f"{rule}{_seen_by(ranks, all_ranks)}", _REMEDY)
            for (value, rule), ranks in list(named.items())[:_SHOWN]
        ]
    )


def _seen_by(ranks: Sequence[int], all_ranks: int) -> str:
    if len(ranks) == all_ranks:
        return ""
    return f" (as rank {ranks[0]}{' and others see' if len(ranks) > 1 else ' sees'} it)"


def _look(path: Path) -> _Seen | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return _Seen(found.st_size, found.st_mtime_ns, found.st_ino)


def _describe(before: _Seen, now: _Seen | None) -> str:
    if now is None:
        return "it was there when training began, and cannot be found any more"
    if now.size != before.size:
        return f"it had {before.size} bytes when training began, and has {now.size} now"
    if now.inode != before.inode:
        return "another file has taken its place while it was trained on"
    when = datetime.fromtimestamp(now.changed_ns / 1e9, UTC)
    return f"it was written to at {when:%Y-%m-%d %H:%M:%S} UTC, while it was trained on"
