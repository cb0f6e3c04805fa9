"""Judgement of steps: those that are not finite, and optionally spikes, must not update the weights.

The rule for spikes is that of OLMo-core's skip-step optimizers: a step is skipped if its loss or gradient
norm is k standard deviations above the mean of the steps before it. Skipped spikes enter the window too, so
that a permanent shift of the loss is accepted in the end. Everything is a function of figures that all ranks
share, so that all ranks decide alike.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from recipes.engines.base import may_update
from recipes.runtime.config import FaultsConfig

# Limit that no norm can meet.
NO_UPDATE = -1.0


class Verdict(Enum):
    """Verdict on a step."""

    UPDATED = "updated"
    NONFINITE = "nonfinite"
    SPIKE = "spike"


@dataclass(frozen=True)
class StepJudgement:
    """Judgement of a step.

    Attributes:
        verdict: The verdict.
        in_a_row: Number of steps with this verdict in a row, including this one.
        skipped: Number of skipped steps of the stage so far.
        limits: Limits of loss and gradient norm; infinite without a limit.
    """

    verdict: Verdict
    in_a_row: int
    skipped: int
    limits: tuple[float, float] = (math.inf, math.inf)


class StepGuard:
    """Judge of the steps of one stage, whose state is part of every checkpoint."""

    def __init__(self, config: FaultsConfig, state: Mapping[str, Any] | None = None) -> None:
        """Continues from what `state` returned; None starts anew, e.g. for checkpoints without it."""
        self.config = config
        known = state or {}
        self.skipped = int(known.get("skipped", 0))
        self._nonfinite = int(known.get("nonfinite", 0))
        self._spikes = int(known.get("spikes", 0))
        self._set_windows(known)

    def state(self) -> dict[str, Any]:
        """Returns the state for a checkpoint; JSON keeps every float exactly."""
        return {
            "skipped": self.skipped,
            "nonfinite": self._nonfinite,
            "spikes": self._spikes,
            "losses": list(self._losses),
            "norms": list(self._norms),
        }

    def _set_windows(self, state: Mapping[str, Any]) -> None:
        size = self.config.spike_window
        self._losses: deque[float] = deque(state.get("losses", ()), maxlen=size)
        self._norms: deque[float] = deque(state.get("norms", ()), maxlen=size)

    def went_back(self, state: Mapping[str, Any]) -> None:
        """Resets the windows to those of the checkpoint that the weights went back to."""
        self._set_windows(state)
        self._spikes = 0

    def norm_limit(self, loss: float) -> float:
        """Returns the largest gradient norm with which a step of this loss may update.

        Args:
            loss: Loss over all ranks, known before the update.
        """
        if not math.isfinite(loss) or loss > self._limit(self._losses):
            return NO_UPDATE
        return self._limit(self._norms)

    def judge(self, loss: float, norm: float) -> StepJudgement:
        """Counts a step and adds it to the window.

        Args:
            loss: Loss over all ranks.
            norm: Norm that `TrainModule.step` returned under the `norm_limit`.
        """
        limits = self._limit(self._losses), self._limit(self._norms)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            verdict = Verdict.NONFINITE
        elif may_update(norm, self.norm_limit(loss)):
            verdict = Verdict.UPDATED
        else:
            verdict = Verdict.SPIKE
        self._nonfinite = self._nonfinite + 1 if verdict is Verdict.NONFINITE else 0
        self._spikes = self._spikes + 1 if verdict is Verdict.SPIKE else 0
        self.skipped += verdict is not Verdict.UPDATED
        if self.config.spike_sigma is not None and verdict is not Verdict.NONFINITE:
            self._losses.append(loss)
            self._norms.append(norm)
        return StepJudgement(verdict, max(self._nonfinite, self._spikes), self.skipped, limits)

    def _limit(self, window: Sequence[float]) -> float:
        """Returns the limit that the figures before it set."""
        sigma = self.config.spike_sigma
        if sigma is None or len(window) < max(2, self.config.spike_window // 2):
            return math.inf
        return statistics.fmean(window) + sigma * statistics.stdev(window)
