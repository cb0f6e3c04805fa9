"""Which rank holds up the others, from where each of them is."""

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
    """Where a rank is.

    Attributes:
        rank: Its number.
        metadata: Marks that it has passed. All ranks pass the same ones.
        where: Of the last mark, in words.
        waited_s: Seconds since then.
        at: The line of code that it is in.
        kind: Whether that line waits for others: a collective, maybe (a backward pass of DDP), or not.
    """

    rank: int
    metadata: int
    where: str
    waited_s: float
    at: str
    kind: Kind

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def describe(position: Position) -> str:
    """A rank in a line."""
    return (
        f"rank {position.rank} {_DOING[position.kind]}, for {position.waited_s:.1f} s in {position.where}: "
        f"{position.at}"
    )


def verdict(
    told: Sequence[Position], world_size: int, limit_s: float, left: Mapping[int, str] | None = None
) -> tuple[str, tuple[int, ...]]:
    """Names the ranks that the others wait for.

    A rank that does not answer is to blame before all others: its process is stopped, or stuck so that none
    of its threads runs, or gone with its machine. So is one that an error has ended. Then those that have
    passed the fewest marks, and of them those that do not wait for others themselves.

    Args:
        told: Of the ranks that have answered.
        world_size: Number of ranks.
        limit_s: The limit that was passed.
        left: Of the ranks that have ended, why; empty of those that had come to the end of the run.

    Returns:
        The text, and the ranks that are named; none where all wait for one another.
    """
    ended = dict(left or {})
    silent = sorted(set(range(world_size)) - {position.rank for position in told} - ended.keys())
    failed = sorted(rank for rank, why in ended.items() if why)
    named = sorted([*silent, *failed]) or _behind(told)
    lines = {position.rank: describe(position) for position in told}
    lines |= {rank: f"rank {rank} {_SILENT}" for rank in silent}
    lines |= {rank: f"rank {rank} has ended" + (f": {why}" if why else "") for rank, why in ended.items()}
    shown = [*named, *(rank for rank in lines if rank not in named)][:_SHOWN]
    text = [_headline(silent, failed, named, limit_s), *(f"  {lines[rank]}" for rank in shown)]
    if world_size > _SHOWN:
        text.append(f"  ... and {world_size - _SHOWN} more ranks")
    return "\n".join(text), tuple(named)


def _behind(told: Sequence[Position]) -> list[int]:
    if not told:
        return []
    fewest = min(position.metadata for position in told)
    last = [position for position in told if position.metadata == fewest]
    own = [position.rank for position in last if position.kind == "elsewhere"]
    if own:
        return sorted(own)
    return sorted(position.rank for position in last) if len(last) < len(told) else []


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
        "have come to different collectives"
    )


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:_SHOWN]))}"
