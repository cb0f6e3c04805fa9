"""Guard of a stage: decides whether a step may update the weights, and whether the run may go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe.errors import GraftError
from recipes.tracking.bad_batch import BadStep, record_bad_batch
from recipes.tracking.metrics_log import Metric
from recipes.training.guards.run_guards import RunGuards
from recipes.training.guards.step_guard import NO_UPDATE, StepGuard, StepJudgement, Verdict
from recipes.training.guards.watched_files import WatchedFiles, changed_everywhere
from recipes.training.hooks.base import StageContext, StepHook, TrainStep, get_rng

STATE = "guard"
"""Name of the step guard's state in a checkpoint."""

_SHOWN_RANKS = 8


class DivergedError(GraftError):
    """Error of a loss or gradient that is not finite, too often in a row; the weights are unharmed."""


@dataclass(frozen=True)
class StepBeginning:
    """State at the beginning of a step besides tensors, which skipped steps do not change.

    Attributes:
        step: Steps before it.
        rng: Random states of this rank.
        state: State of the step guard.
    """

    step: int
    rng: Mapping[str, Tensor]
    state: Mapping[str, Any]


class StageGuard(StepHook):
    """Guard of one stage in one process, whose decisions are the same on all ranks.

    Attributes:
        begun: Beginning of the present step, or of the first of several steps in a row that are not finite.
        problem: Error that ends the run; None while it may go on.
    """

    def __init__(self, run: StageContext, guards: RunGuards) -> None:
        """Continues from the state in the stage's checkpoint, if any."""
        super().__init__(run)
        self._guards = guards
        self._steps = StepGuard(guards.faults, run.stage.state.get(STATE))
        self._files = WatchedFiles(run.stage.data.files)
        self._judgement = StepJudgement(Verdict.UPDATED, 0, self._steps.skipped)
        self._changes = self._files.changes()
        self.begun: StepBeginning | None = None
        self.problem: GraftError | None = None

    def before_step(self, step: TrainStep) -> None:
        """Keeps the beginning of the step, unless the step before was not finite."""
        if self._judgement.verdict is not Verdict.NONFINITE:
            self.begun = StepBeginning(step.number, get_rng(self.run.engine.device), self._steps.state())

    def after_gradients(self, step: TrainStep) -> dict[str, Metric]:
        """Returns the number of data files that have changed."""
        self._changes = self._files.changes()
        return {"changed_files": Metric(float(len(self._changes)), "sum")}

    def before_update(self, step: TrainStep) -> None:
        """Limits the gradient norm, by the loss and the data files of all ranks."""
        changed, loss = step.reduced["changed_files"], step.reduced["loss"]
        step.norm_limit = NO_UPDATE if changed else self._steps.norm_limit(loss)

    def after_update(self, step: TrainStep) -> None:
        """Judges the step, and reports it on rank 0 if it updated nothing. Collective."""
        if step.reduced["changed_files"]:
            self.problem = changed_everywhere(self._changes, self.run.engine.data_group)
            self._judgement = StepJudgement(Verdict.SPIKE, 0, self._steps.skipped)
            return
        loss, norm = step.reduced["loss"], step.grad_norm
        self._judgement = found = self._steps.judge(loss, norm)
        if found.verdict is Verdict.SPIKE:
            self._log_spike(step.done, loss, norm, found)
        elif found.verdict is Verdict.NONFINITE:
            bad = BadStep(self.run.stage.name, step.done, loss, norm, found.in_a_row)
            self._report_nonfinite(bad, torch.stack(step.losses).tolist(), step.samples)

    def figures(self, step: TrainStep) -> dict[str, float]:
        """Returns the number of skipped steps, and a mark if this step is one of them."""
        row: dict[str, float] = {"skipped_steps": self._judgement.skipped}
        return row if self._judgement.verdict is Verdict.UPDATED else row | {"skipped": 1}

    def must_go_back(self) -> bool:
        """Returns whether there were too many spikes in a row, so that the weights must go back."""
        after, found = self._guards.faults.rollback_after, self._judgement
        return after is not None and found.verdict is Verdict.SPIKE and found.in_a_row >= after

    def went_back(self, state: Mapping[str, Any]) -> None:
        """Continues from the state of the checkpoint that the weights went back to."""
        self._steps.went_back(state.get(STATE) or {})

    def state(self) -> dict[str, Any]:
        """Returns the step guard's state under its name in a checkpoint."""
        return {STATE: self._steps.state()}

    def _report_nonfinite(
        self, bad: BadStep, losses: Sequence[float], samples: Sequence[tuple[int, int]]
    ) -> None:
        limit = self._guards.faults.max_nonfinite
        record = record_bad_batch(bad, losses, samples, self._guards.folder, self.run.engine.data_group)
        where = f"its samples are listed in {record.path}" if record.path else "its samples were not listed"
        if record.problem:
            where += f" ({record.problem})"
        found = (
            f"{self.run.stage.title}: at step {bad.step} the loss is {bad.loss} and the gradient norm "
            f"{bad.grad_norm}{_of_ranks(record.bad_ranks, self.run.engine.world_size)}"
        )
        if bad.in_a_row < limit:
            self._log(f"{found}; the step is skipped ({bad.in_a_row} in a row, {limit} end the run); {where}")
            return
        row = "" if limit == 1 else f", the {limit} steps in a row that faults.max_nonfinite allows for"
        self.problem = DivergedError(
            f"{found}{row}; the weights were not updated, and {where}. Checkpoints are in "
            f"{self.run.stage.checkpoints}: lower optim.lr (now {self.run.stage.optim.lr}) or raise "
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
            f"{self.run.stage.title}: step {step} is skipped, a spike ({found.in_a_row} in a row): its "
            f"{' and its '.join(high)}, {faults.spike_sigma:g} standard deviations over the mean of the last "
            f"{faults.spike_window} steps at most"
        )

    def _log(self, line: str) -> None:
        if self.run.engine.rank == 0:
            print(line, flush=True)


def _of_ranks(bad: Sequence[int], count: int) -> str:
    """Names the ranks whose own losses are not finite, unless that says nothing."""
    if count == 1 or len(bad) == count:
        return ""
    if not bad:
        return " (the loss of every rank is finite: it came up in a backward pass)"
    shown = ", ".join(map(str, bad[:_SHOWN_RANKS])) + (" ..." if len(bad) > _SHOWN_RANKS else "")
    return f" (from rank {shown})" if len(bad) == 1 else f" (from ranks {shown})"
