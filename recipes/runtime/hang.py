"""Finds the rank that the others wait for, from the position of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["collective", "backward", "elsewhere"]
_SHOWN = 16
_SILENT = "does not answer: its process is stopped or stuck, or its machine gone"
_DOING = {
    "collective": "waits for other ranks",
    "backward": "is in a backward pass, in which it may wait for other ranks",
    "elsewhere": "is in its own code",
}


@dataclass(frozen=True)
class Position:
    """Position of a rank in the run.

    Attributes:
        rank: Its number.
        beats: Number of beats that it has passed. All ranks pass the same ones.
        where: Description of the last beat.
        waited_s: Seconds since then.
        at: The line of code that it is in.
        kind: Whether that line waits for others: a collective does, a backward pass of DDP may.
    """

    rank: int
    beats: int
    where: str
    waited_s: float
    at: str
    kind: Kind

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields for JSON."""
        return asdict(self)


def describe(position: Position) -> str:
    """Describes a rank in a line."""
    return (
        f"rank {position.rank} {_DOING[position.kind]}, for {position.waited_s:.1f} s in {position.where}: "
        f"{position.at}"
    )


def verdict(
    positions: Sequence[Position], world_size: int, limit_s: float, left: Mapping[int, str] | None = None
) -> tuple[str, tuple[int, ...]]:
    """Names the ranks that the others wait for.

    Ranks that do not answer are blamed first (stopped, stuck, or gone with their machine), and ranks that an
    error has ended. Next come those with the fewest beats, and among them those that do not wait for others
    themselves.

    Args:
        positions: Positions of the ranks that have answered.
        world_size: Number of ranks.
        limit_s: The limit that was exceeded.
        left: Rank -> why it has ended; empty if it had reached the end of the run.

    Returns:
        The text, and the blamed ranks; none if all wait for one another.
    """
    ended = dict(left or {})
    silent = sorted(set(range(world_size)) - {position.rank for position in positions} - ended.keys())
    failed = sorted(rank for rank, why in ended.items() if why)
    named = sorted([*silent, *failed]) or _behind(positions)
    lines = {position.rank: describe(position) for position in positions}
    lines |= {rank: f"rank {rank} {_SILENT}" for rank in silent}
    lines |= {rank: f"rank {rank} has ended" + (f": {why}" if why else "") for rank, why in ended.items()}
    shown = [*named, *(rank for rank in lines if rank not in named)][:_SHOWN]
    text = [_headline(silent, failed, named, limit_s), *(f"  {lines[rank]}" for rank in shown)]
    if world_size > _SHOWN:
        text.append(f"  ... and {world_size - _SHOWN} more ranks")
    return "\n".join(text), tuple(named)


def _behind(positions: Sequence[Position]) -> list[int]:
    if not positions:
        return []
    fewest = min(position.beats for position in positions)
    last = [position for position in positions if position.beats == fewest]
    own = [position.rank for position in last if position.kind == "elsewhere"]
    if own:
        return sorted(own)
    return sorted(position.rank for position in last) if len(last) < len(positions) else []


def _headline(silent: Sequence[int], failed: Sequence[int], named: Sequence[int], limit_s: float) -> str:
    who = _ranks(silent or failed or named)
    have = "has" if len(silent or failed or named) == 1 else "have"
    if silent:
        return f"the run hangs: nothing has been heard of {who} when all were called after {limit_s:g} s"
    if failed:
        return f"the run hangs: {who} {have} ended, and the others have waited for {limit_s:g} s"
    if named:
        return f"the run hangs: {who} {have} made no progress for {limit_s:g} s"
    return (
        f"the run hangs: no rank has made progress for {limit_s:g} s, and each waits for others; they may "
        "have reached different collectives"
    )


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:_SHOWN]))}"
