"""Recovery from steps that go wrong: the stage ends, or its weights go back to a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recipes.checkpoint import find_checkpoint
from recipes.training.hooks.base import StageContext, StepHook, TrainStep
from recipes.training.hooks.stage_saves import StageSaves, load_stage

if TYPE_CHECKING:
    from recipes.training.guards.stage_guard import StageGuard


class Recovery(StepHook):
    """Reaction to the verdicts of a stage's guard."""

    def __init__(self, run: StageContext, guard: StageGuard, saves: StageSaves) -> None:
        super().__init__(run)
        self._guard = guard
        self._saves = saves

    def after_step(self, step: TrainStep) -> None:
        """Goes back after too many spikes in a row.

        Raises:
            GraftError: The run may not go on. The checkpoint that it leaves is from before the bad steps.
        """
        guard = self._guard
        if guard.problem is not None:
            assert guard.begun is not None, "a problem is found in a step, which has begun"
            self._saves.save_beginning(guard.begun)
            raise guard.problem
        if guard.must_go_back():
            self._go_back(step)

    def _go_back(self, step: TrainStep) -> None:
        """Takes the weights of the newest checkpoint; the samples since then are not taken again."""
        run = self.run
        with run.pauses.pause("going_back"):
            self._saves.settle()
            found = find_checkpoint(run.stage.checkpoints, run=run.stage.origin.run)
            path = found.path
            if path is not None:
                loaded = load_stage(run.engine, run.stage, path)
                self._guard.went_back(loaded.state)
                step.row["went_back_to"] = loaded.step
        if run.engine.rank == 0:
            for line in found.lines():
                print(f"{run.stage.title}: {line}", flush=True)
            words = f"went back to {path}; the samples since then are not taken again"
            print(
                f"{run.stage.title}: {words if path else 'there is no checkpoint to go back to'}", flush=True
            )
