"""Progressive sparsification: more experts a token in the lower layers at first, fewer later.

Source: Sigma-MoE-Tiny (arXiv 2512.16248) and its project page: lower layers, which balance worst at one
expert a token, activate more experts for most of the pre-training, and are then brought to the target in one
step. The page does not give the numbers of each layer; a secondary source has the switch near 90 percent of
the tokens.

What K is at a step follows from the step alone, so that a run that goes on needs nothing saved.

Letters: K experts a token, L mixture layers, from the lowest to the highest.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from moe.errors import require
from moe.types import Config


@dataclass(frozen=True)
class SparsePhase(Config):
    """A stretch of a run in which some layers use more experts a token than the router's ``top_k``."""

    until: float
    """Where it ends: below 1 a share of the run's tokens, above 1 a number of tokens. Shares follow the
    length of the run; the step in which the end falls still belongs to the phase."""
    top_k: int | list[int]
    """Experts a token: of the layers that ``layers`` says, or one number for each of the lowest layers. The
    others use the router's ``top_k``, as all layers do behind the last phase."""
    layers: int | None = None
    """How many of the lowest mixture layers one number is of; null: all of them."""

    def __post_init__(self) -> None:
        numbers = [self.top_k] if isinstance(self.top_k, int) else self.top_k
        require(
            self,
            (
                0 < self.until != 1,
                "until",
                "a phase ends within the run",
                "Give a share of its tokens below 1, such as 0.9, or a number of tokens.",
            ),
            (
                isinstance(self.top_k, int) or self.layers is None,
                "layers",
                "top_k names a number for each layer already",
                "Leave layers out, or give one number by top_k.",
            ),
            (
                min(numbers, default=0) >= 1,
                "top_k",
                "a token needs at least one expert",
                "Set 1 or more.",
            ),
            (
                self.layers is None or self.layers >= 1,
                "layers",
                "a phase is of at least one layer",
                "Set 1 or more, or null.",
            ),
        )

    @property
    def num_listed(self) -> int:
        """How many of the lowest layers it names, 0 where it is of all."""
        return (self.layers or 0) if isinstance(self.top_k, int) else len(self.top_k)

    def experts(self, position: int, otherwise: int) -> int:
        """K of the mixture layer at a position from below; ``otherwise`` where the phase does not name it."""
        if isinstance(self.top_k, int):
            return self.top_k if self.layers is None or position < self.layers else otherwise
        return self.top_k[position] if position < len(self.top_k) else otherwise

    def end(self, steps: int, tokens_per_step: int) -> int:
        """The first step that is not of the phase any more.

        Args:
            steps: Of the whole run.
            tokens_per_step: Over all ranks and micro-batches.
        """
        # A fraction of the number as it is written: 0.07 * 100 is above 7, and would be rounded up to 8.
        written = Fraction(str(self.until))
        return math.ceil(written * steps if self.until < 1 else written / tokens_per_step)


@dataclass(frozen=True)
class TopKSchedule:
    """K of every layer at every step.

    Attributes:
        starts: The steps at which K changes, ascending; the first is 0.
        top_k: From each of them on, layer index to K, of every mixture layer.
    """

    starts: tuple[int, ...]
    top_k: tuple[Mapping[int, int], ...]

    def __post_init__(self) -> None:
        ascends = all(a < b for a, b in zip(self.starts, self.starts[1:], strict=False))
        assert self.starts[:1] == (0,) and ascends and len(self.starts) == len(self.top_k), self.starts

    def at(self, step: int) -> Mapping[int, int]:
        """Layer index to K of a step, which has so many steps before it."""
        return self.top_k[bisect_right(self.starts, step) - 1]


def make_schedule(
    phases: Sequence[SparsePhase], layers: Sequence[int], top_k: int, steps: int, tokens_per_step: int
) -> TopKSchedule:
    """Lays the phases out over a run.

    Args:
        phases: In order; their ends ascend.
        layers: Indices of the mixture layers in the host, ascending.
        top_k: The router's own, of layers that a phase does not name and behind the last phase.
        steps: Of the whole run.
        tokens_per_step: Over all ranks and micro-batches.
    """
    starts = (0, *(phase.end(steps, tokens_per_step) for phase in phases))
    numbers = [
        {layer: phase.experts(position, top_k) for position, layer in enumerate(layers)} for phase in phases
    ]
    return TopKSchedule(starts, (*numbers, dict.fromkeys(layers, top_k)))
