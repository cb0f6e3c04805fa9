"""Which rank holds up the others, from where each of them is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["collective", "backward", "elsewhere"]
_SHOWN = 16
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
        marks: Marks that it has passed. All ranks pass the same ones.
        where: Of the last mark, in words.
        waited_s: Seconds since then.
        at: The line of code that it is in.
        kind: Whether that line waits for others: a collective, maybe (a backward pass of DDP), or not.
    """

    rank: int
    marks: int
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


def verdict(told: Sequence[Position], world_size: int, limit_s: float) -> tuple[str, tuple[int, ...]]:
    """Names the ranks that the others wait for.

    A rank that does not answer is to blame before all others: its process is stopped, or stuck so that none
    of its threads runs, or gone with its machine. Then those that have passed the fewest marks, and of them
    those that do not wait for others themselves.

    Args:
        told: Of the ranks that have answered.
        world_size: Number of ranks.
        limit_s: The limit that was passed.

    Returns:
        The text, and the ranks that are named; none where all wait for one another.
    """
    silent = sorted(set(range(world_size)) - {position.rank for position in told})
    named = silent or _behind(told)
    answers = {position.rank: position for position in told}
    lines = [_headline(silent, named, limit_s)]
    for rank in [*named, *(rank for rank in answers if rank not in named)][:_SHOWN]:
        if rank in answers:
            lines.append(f"  {describe(answers[rank])}")
        else:
            lines.append(
                f"  rank {rank} does not answer: its process is stopped or stuck, or its machine gone"
            )
    if world_size > _SHOWN:
        lines.append(f"  ... and {world_size - _SHOWN} more ranks")
    return "\n".join(lines), tuple(named)


def _behind(told: Sequence[Position]) -> list[int]:
    fewest = min(position.marks for position in told)
    last = [position for position in told if position.marks == fewest]
    own = [position.rank for position in last if position.kind == "elsewhere"]
    if own:
        return sorted(own)
    return sorted(position.rank for position in last) if len(last) < len(told) else []


def _headline(silent: Sequence[int], named: Sequence[int], limit_s: float) -> str:
    who = f"rank{'s' * (len(named) > 1)} {', '.join(map(str, named[:_SHOWN]))}"
    if silent:
        return f"the run hangs: nothing has been heard of {who} when all were called after {limit_s:g} s"
    if named:
        return (
            f"the run hangs: {who} {'has' if len(named) == 1 else 'have'} made no progress for {limit_s:g} s"
        )
    return (
        f"the run hangs: no rank has made progress for {limit_s:g} s, and each waits for others; they may "
        "have come to different collectives"
    )
