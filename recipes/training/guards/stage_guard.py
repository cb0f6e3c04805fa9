"""Decides, step by step, whether a leg's weights may be updated, and whether the run may go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe.errors import GraftError
from recipes.engines import Engine
from recipes.tracking.bad_batch import BadStep, record_bad_batch
from recipes.tracking.metrics_log import Metric
from recipes.training.guards.run_guards import RunGuards
from recipes.training.guards.step_guard import NO_UPDATE, StepGuard, StepJudgement, Verdict
from recipes.training.guards.watched_files import WatchedFiles, changed_everywhere
from recipes.training.stage import Stage

STATE = "guard"
"""Under this name a checkpoint keeps what the judge of the steps remembers."""

_SHOWN_RANKS = 8


class DivergedError(GraftError):
    """The loss or the gradient is not finite, too often in a row; nothing was updated by it."""


@dataclass(frozen=True)
class Begun:
    """What a step begins with besides tensors; a step that updates nothing leaves those as they are.

    Attributes:
        step: Steps done before it.
        rng: Random states of this rank.
        state: What the judge remembers.
    """

    step: int
    rng: Mapping[str, Tensor]
    state: Mapping[str, Any]


class StageGuard:
    """Of one leg in one process; every decision is the same on all ranks.

    Attributes:
        begun: What the present step began with; of several in a row that are not finite, the first.
        problem: Why the run may not go on; None while it may.
    """

    def __init__(self, engine: Engine[Any], guards: RunGuards, stage: Stage) -> None:
        """Goes on from what the leg's checkpoint remembers, if anything."""
        self._engine = engine
        self._guards = guards
        self._stage = stage
        self._steps = StepGuard(guards.faults, stage.state.get(STATE))
        self._files = WatchedFiles(stage.data.files)
        self._in_a_row = 0
        self._changes = self._files.changes()
        self.begun: Begun | None = None
        self.problem: GraftError | None = None

    def begin(self, step: int, rng: Mapping[str, Tensor]) -> None:
        """A step begins."""
        if self._in_a_row == 0:
            self.begun = Begun(step, rng, self._steps.state())

    def measures(self) -> dict[str, Metric]:
        """What all ranks must know before the update: whether the data is on each of them what it was."""
        self._changes = self._files.changes()
        return {"changed_files": Metric(float(len(self._changes)), "sum")}

    def norm_limit(self, reduced: Mapping[str, float]) -> float:
        """For `TrainModule.step`.

        Args:
            reduced: ``loss`` and `measures`, over all ranks.
        """
        return NO_UPDATE if reduced["changed_files"] else self._steps.norm_limit(reduced["loss"])

    def judge(
        self,
        step: int,
        reduced: Mapping[str, float],
        norm: float,
        losses: Sequence[Tensor],
        samples: Sequence[tuple[int, int]],
    ) -> StepJudgement:
        """What became of a step, said on rank 0 where that is nothing. Collective.

        Args:
            step: Steps before it.
            reduced: As for `norm_limit`.
            norm: Of its gradient.
            losses: Of this rank's micro-batches.
            samples: First sample and number of samples of each of them.
        """
        if reduced["changed_files"]:
            self.problem = changed_everywhere(self._changes, self._engine.data_group)
            return StepJudgement(Verdict.SPIKE, 0, self._steps.skipped)
        found = self._steps.judge(reduced["loss"], norm)
        self._in_a_row = found.in_a_row if found.verdict is Verdict.NONFINITE else 0
        if found.verdict is Verdict.SPIKE:
            self._log_spike(step, reduced["loss"], norm, found)
        elif found.verdict is Verdict.NONFINITE:
            bad = BadStep(self._stage.name, step + 1, reduced["loss"], norm, found.in_a_row)
            self._tell_nonfinite(bad, torch.stack(list(losses)).tolist(), samples)
        return found

    def goes_back(self, found: StepJudgement) -> bool:
        """Whether there were so many spikes in a row that the weights are to go back."""
        after = self._guards.faults.rollback_after
        return after is not None and found.verdict is Verdict.SPIKE and found.in_a_row >= after

    def went_back(self, state: Mapping[str, Any]) -> None:
        """The weights are those of the checkpoint that had this state."""
        self._steps.went_back(state.get(STATE) or {})

    def state(self) -> dict[str, Any]:
        """For the checkpoint, by its name there."""
        return {STATE: self._steps.state()}

    def _tell_nonfinite(
        self, bad: BadStep, losses: Sequence[float], samples: Sequence[tuple[int, int]]
    ) -> None:
        limit = self._guards.faults.max_nonfinite
        record = record_bad_batch(bad, losses, samples, self._guards.folder, self._engine.data_group)
        where = f"its samples are listed in {record.path}" if record.path else "its samples were not listed"
        if record.problem:
            where += f" ({record.problem})"
        found = (
            f"{self._stage.title}: at step {bad.step} the loss is {bad.loss} and the gradient norm "
            f"{bad.grad_norm}{_of_ranks(record.bad_ranks, self._engine.world_size)}"
        )
        if bad.in_a_row < limit:
            self._log(f"{found}; the step is skipped ({bad.in_a_row} in a row, {limit} end the run); {where}")
            return
        row = "" if limit == 1 else f", the {limit} steps in a row that faults.max_nonfinite allows for"
        self.problem = DivergedError(
            f"{found}{row}; the weights were not updated, and {where}. Checkpoints are in "
            f"{self._stage.checkpoints}: lower optim.lr (now {self._stage.optim.lr}) or raise "
            "optim.schedule.warmup_steps, and set resume=auto."
        )

    def _log_spike(self, step: int, loss: float, norm: float, found: StepJudgement) -> None:
        faults = self._guards.faults
        high = [
            f"{name} is {value:.4g}, above {limit:.4g}"
            for name, value, limit in zip(("loss", "gradient norm"), (loss, norm), found.limits, strict=True)
            if value > limit
        ]
        self._log(
            f"{self._stage.title}: step {step + 1} is skipped, a spike ({found.in_a_row} in a row): its "
            f"{' and its '.join(high)}, {faults.spike_sigma:g} standard deviations over the mean of the last "
            f"{faults.spike_window} steps at most"
        )

    def _log(self, line: str) -> None:
        if self._engine.rank == 0:
            print(line, flush=True)


def _of_ranks(bad: Sequence[int], count: int) -> str:
    """Which ranks' own losses are not finite, where that tells anything."""
    if count == 1 or len(bad) == count:
        return ""
    if not bad:
        return " (the loss of every rank is finite: it came up in a backward pass)"
    shown = ", ".join(map(str, bad[:_SHOWN_RANKS])) + (" ..." if len(bad) > _SHOWN_RANKS else "")
    return f" (from rank {shown})" if len(bad) == 1 else f" (from ranks {shown})"
