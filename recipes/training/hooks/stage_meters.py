"""Meters of a stage: what its steps use of the hardware, and what its routers do."""

from __future__ import annotations

from typing import Any

from recipes.engines import Engine
from recipes.tracking.metrics_log import reduce_metrics
from recipes.tracking.run_meters import RunMeters, WindowFigures
from recipes.tracking.step_figures import StepFigures, StepWork, router_figures
from recipes.training.hooks.base import StepHook, TrainStep, is_due
from recipes.training.stage import Stage, StageResult


class StageMeters(StepHook):
    """Utilisation, memory, energy and load figures of a stage's steps."""

    def __init__(
        self, engine: Engine[Any], stage: Stage, meters: RunMeters | None, window: WindowFigures
    ) -> None:
        """Starts from what earlier stages have used.

        Args:
            engine: The engine of the run.
            stage: The stage that is trained.
            meters: Meters of memory and energy; None measures neither.
            window: Sums since the last reading, over all stages of the process.
        """
        self._engine = engine
        self._stage = stage
        self._meters = meters
        self._window = window
        self._figures = StepFigures(stage.step_costs, stage.costs, verbose=engine.rank == 0)
        self._metered: dict[str, float] = {}

    def at_start(self) -> None:
        """Starts a new window: what was used before is not the first steps'."""
        self._window.begin_stage()
        if self._meters is not None:
            self._meters.between()

    def after_update(self, step: TrainStep) -> None:
        """Reads the meters, now that memory is at its peak, where rows are printed and before other work."""
        train = self._stage.train
        intervals = (train.log_every, train.eval_every, train.save_every)
        due = step.done == train.steps or any(is_due(step.done, every) for every in intervals)
        self._metered = {}
        if self._meters is not None and due:
            self._metered = reduce_metrics(self._meters.of_window(), self._engine.data_group)

    def figures(self, step: TrainStep) -> dict[str, float]:
        """Returns the figures of the hardware and of the routers."""
        stage, engine = self._stage, self._engine
        passes = len(step.losses) * engine.data_ranks
        work = StepWork(
            stage.tokens_per_step, step.seconds, engine.world_size, passes, step.load, step.attention
        )
        row = self._figures.of_step(stage.costs_at(step.number), work)
        self._window.add_tokens(stage.tokens_per_step)
        if self._metered:
            row |= self._window.of_row(self._metered)
        return row | router_figures(step.load) | router_figures(step.attention, "attention/")

    def at_end(self, result: StageResult) -> None:
        """Notes which figures are missing, and why."""
        result.missing = self._figures.missing() | ({} if self._meters is None else self._meters.reasons)
