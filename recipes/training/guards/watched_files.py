"""Whether the files that training reads are still what they were when it began.

They are mapped into memory: one that shrinks ends a process without a word when its pages are read, and one
that is written to changes what samples mean.
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
    """Some files, as they were when this was made.

    Attributes:
        paths: Their paths.
    """

    paths: Sequence[Path]
    _before: dict[Path, _Seen | None] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._before = {path: _look(path) for path in self.paths}

    def changes(self) -> list[Mistake]:
        """What has become of them; empty where all are as they were. A look at names and sizes only."""
        pairs = ((path, before, _look(path)) for path, before in self._before.items())
        return [
            Mistake("data file", str(path), _what(before, now), _REMEDY)
            for path, before, now in pairs
            if before is not None and now != before
        ]


def changed_everywhere(own: Sequence[Mistake], group: ProcessGroup | None) -> DataError:
    """The error that every rank raises when at least one has found a change. Collective."""
    told = Ranks(group).gather([(str(m.value), m.rule) for m in own])
    named: dict[tuple[str, str], list[int]] = {}
    for rank, mistakes in enumerate(told):
        for value, rule in mistakes:
            named.setdefault((value, rule), []).append(rank)
    all_ranks = len(told)
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


def _what(before: _Seen, now: _Seen | None) -> str:
    if now is None:
        return "it was there when training began, and cannot be found any more"
    if now.size != before.size:
        return f"it had {before.size} bytes when training began, and has {now.size} now"
    if now.inode != before.inode:
        return "another file has taken its place while it was trained on"
    when = datetime.fromtimestamp(now.changed_ns / 1e9, UTC)
    return f"it was written to at {when:%Y-%m-%d %H:%M:%S} UTC, while it was trained on"
