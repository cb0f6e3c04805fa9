"""Learning-rate schedules: the learning rate as a function of the step alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from moe.errors import require
from moe.types import Config, unless


@dataclass(frozen=True)
class ScheduleConfig(Config):
    """Learning-rate schedule of a run; see `lr_factor`.

    Attributes:
        kind: ``cosine``, ``constant``, or ``wsd`` (warm up, stay, decay linearly).
        warmup_steps: Optimizer steps before the full learning rate is reached; where no option of a command
            sets them, at most a fifth of the run.
        decay_fraction: Share of the run's steps, at its end, over which ``wsd`` decays.
        min_lr_ratio: Share of the full learning rate at the last step (not used by ``constant``).
    """

    kind: Literal["cosine", "constant", "wsd"] = "cosine"
    warmup_steps: int = 0
    decay_fraction: float = 0.1
    min_lr_ratio: float = 0.1

    def __post_init__(self) -> None:
        require(
            self,
            (
                self.kind in ("cosine", "constant", "wsd"),
                "kind",
                "is no schedule",
                "Choose cosine, constant or wsd.",
            ),
            (self.warmup_steps >= 0, "warmup_steps", "must be 0 or more", "Give 0 for none."),
            (
                0 < self.decay_fraction <= 1,
                "decay_fraction",
                "must be in (0, 1]",
                "Give constant for no decay.",
            ),
            (
                0 <= self.min_lr_ratio <= 1,
                "min_lr_ratio",
                "must be in [0, 1]",
                "It is a share of lr, not a rate.",
            ),
        )

    def decay_steps(self, total_steps: int) -> int:
        """Returns the number of steps over which ``wsd`` decays, at least one."""
        return max(1, round(self.decay_fraction * total_steps))

    def check(self, total_steps: int) -> None:
        """Checks that this schedule fits into a run of ``total_steps``.

        Raises:
            ValueError: Warm-up, and the decay of ``wsd``, need more steps than the run has.
        """
        if self.kind == "constant":
            return
        decay = self.decay_steps(total_steps) if self.kind == "wsd" else 0
        also = f" and the decay takes {decay}" if decay else ""
        require(
            self,
            (
                self.warmup_steps + decay < max(total_steps, 1) or self.warmup_steps == 0,
                "warmup_steps",
                f"does not fit: the run has {total_steps} steps{also}",
                "Lower warmup_steps, or train longer.",
            ),
        )

    def idle(self) -> dict[str, str]:
        """Returns the options without effect; see `Config.idle`."""
        return unless(self.kind == "wsd", "only kind=wsd decays at the end", "decay_fraction") | unless(
            self.kind != "constant", "kind=constant does not decay", "min_lr_ratio"
        )


def lr_factor(step: int, total_steps: int, schedule: ScheduleConfig) -> float:
    """Returns the share of the full learning rate for optimizer step ``step``, counted from 0.

    With W warm-up steps, steps 0..W-1 have ``(step + 1) / (W + 1)`` and step W has 1. ``cosine`` falls from 1
    at step W to ``min_lr_ratio`` at the last step. ``wsd`` stays at 1 and then decays linearly over the last
    ``decay_steps(total_steps)`` steps (S. Hu et al., "MiniCPM", arXiv:2404.06395; linear as in A. Haegele
    et al., arXiv:2405.18392). Steps past the end keep the last value.

    Raises:
        ValueError: The schedule does not fit into ``total_steps``.
    """
    schedule.check(total_steps)
    if step < schedule.warmup_steps:
        return (step + 1) / (schedule.warmup_steps + 1)
    if schedule.kind == "constant":
        return 1.0
    last, low = total_steps - 1, schedule.min_lr_ratio
    if schedule.kind == "cosine":
        progress = _progress(step, schedule.warmup_steps, last)
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - (1 - low) * _progress(step, last - schedule.decay_steps(total_steps), last)


def _progress(step: int, start: int, end: int) -> float:
    if step >= end:
        return 1.0
    return max(0.0, (step - start) / (end - start))
