"""Moments of the kills, drawn from a seed before the job starts."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from recipes.studies.chaos.chaos_settings import ChaosSettings

Kind = Literal["anywhere", "saves", "start"]
_WEIGHTS: dict[Kind, int] = {"anywhere": 3, "saves": 2, "start": 1}


@dataclass(frozen=True)
class Moment:
    """Moment of one kill.

    Attributes:
        kind: ``anywhere``: in the step after `step`; ``saves``: in the first save after it; ``start``: while
            the restart after the kill before this one is starting up.
        step: Steps before it; meaningless for ``start``.
        fraction: Progress of the step, the save or the start-up, from 0 to 1.
        rank: Rank to kill.
    """

    kind: Kind
    step: int
    fraction: float
    rank: int


def draw_moments(settings: ChaosSettings) -> list[Moment]:
    """Draws the kills in order of time.

    The first is never a ``start``: those come while a restart is under way, behind a kill of another kind.
    """
    draw = random.Random(settings.seed)
    if settings.aim == "mixed":
        kinds = draw.choices(list(_WEIGHTS), list(_WEIGHTS.values()), k=settings.kills)
    else:
        kinds = [settings.aim] * settings.kills
    kinds[0] = "anywhere" if kinds[0] == "start" else kinds[0]
    # Saves and steps must follow the last kill.
    last = max(2, settings.steps - 2 * settings.save_every)
    steps = sorted(draw.randrange(1, last) for _ in kinds)
    return [
        Moment(kind, step, draw.random(), draw.randrange(settings.ranks))
        for kind, step in zip(kinds, steps, strict=True)
    ]
