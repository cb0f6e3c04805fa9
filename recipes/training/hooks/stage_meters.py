"""Meters of a stage: what its steps use of the hardware, and what its routers do."""

from __future__ import annotations

from recipes.tracking.metrics_log import reduce_metrics
from recipes.tracking.run_meters import RunMeters, WindowFigures
from recipes.tracking.step_figures import StepFigures, StepWork, router_figures
from recipes.training.hooks.base import StageContext, StepHook, TrainStep, is_due


class StageMeters(StepHook):
    """Utilisation, memory, energy and load figures of a stage's steps."""

    def __init__(self, run: StageContext, meters: RunMeters | None, window: WindowFigures) -> None:
        """Starts from what earlier stages have used.

        Args:
            run: The stage in training.
            meters: Meters of memory and energy; None measures neither.
            window: Sums since the last reading, over all stages of the process.
        """
        super().__init__(run)
        self._meters = meters
        self._window = window
        verbose = run.engine.rank == 0
        self._figures = StepFigures(run.stage.step_costs, run.stage.costs, verbose=verbose)
        self._metered: dict[str, float] = {}

    def at_start(self) -> None:
        """Starts a new window: what was used before is not the first steps'."""
        self._window.begin_stage()
        if self._meters is not None:
            self._meters.between()

    def after_update(self, step: TrainStep) -> None:
        """Reads the meters, now that memory is at its peak, where rows are printed and before other work."""
        train = self.run.stage.train
        intervals = (train.log_every, train.eval_every, train.save_every)
        due = step.done == train.steps or any(is_due(step.done, every) for every in intervals)
        self._metered = {}
        if self._meters is not None and due:
            self._metered = reduce_metrics(self._meters.of_window(), self.run.engine.data_group)

    def figures(self, step: TrainStep) -> dict[str, float]:
        """Returns the figures of the hardware and of the routers."""
        stage, engine = self.run.stage, self.run.engine
        passes = len(step.losses) * engine.data_ranks
        work = StepWork(
            stage.tokens_per_step, step.seconds, engine.world_size, passes, step.load, step.attention
        )
        row = self._figures.of_step(stage.costs_at(step.number), work)
        self._window.add_tokens(stage.tokens_per_step)
        if self._metered:
            row |= self._window.of_row(self._metered)
        return row | router_figures(step.load) | router_figures(step.attention, "attention/")

    def at_end(self) -> None:
        """Notes which figures are missing, and why."""
        reasons = {} if self._meters is None else self._meters.reasons
        self.run.result.missing = self._figures.missing() | reasons
