"""Checkpoints of a stage: when they are saved, what they carry, and how they are read back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from recipes.checkpoint import Loaded, Retention, Saver, load_checkpoint
from recipes.training.guards.stage_guard import STATE, StageGuard, StepBeginning
from recipes.training.hooks.base import StageContext, StepHook, TrainStep, get_rng, is_due, set_rng

if TYPE_CHECKING:
    from recipes.engines.base import Engine
    from recipes.training.stage import Stage


class StageSaves(StepHook):
    """Saves of a stage's checkpoints, in the background if so configured.

    Attributes:
        saved: Step of the newest checkpoint that this process has saved or resumed.
    """

    def __init__(self, run: StageContext, guard: StageGuard, before_save: Callable[[int], None]) -> None:
        """Saves nothing yet.

        Args:
            run: The stage in training.
            guard: Judge of the steps, whose state is saved.
            before_save: Called with the step before each save.
        """
        super().__init__(run)
        train = run.stage.train
        keep = Retention(train.keep_last, "val_loss" if train.keep_best else None)
        self.saved = run.stage.first_step
        self._saver = Saver(run.stage.checkpoints, keep, background=train.async_save, origin=run.stage.origin)
        self._guard = guard
        self._before_save = before_save

    def after_step(self, step: TrainStep) -> None:
        """Puts the figures of earlier saves into the row."""
        step.row |= self._saver.figures()

    def after_row(self, step: TrainStep) -> None:
        """Saves a checkpoint if one is due, and always after the last step."""
        if step.last or is_due(step.done, self.run.stage.train.save_every):
            self._save(step.done, self._guard.state(), get_rng(self.run.engine.device), final=step.last)

    def at_end(self) -> None:
        """Checks that the last step was saved."""
        step = self.run.result.step
        assert self.saved == step, f"step {step} was not saved, the last was {self.saved}"

    def save_beginning(self, begun: StepBeginning) -> None:
        """Saves the state from before a step, if it is newer than the last checkpoint.

        Nothing may have been updated since: with the random state of then, it is as if the steps since had
        not been.
        """
        if begun.step > self.saved:
            set_rng(begun.rng, self.run.engine.device)
            self._save(begun.step, {STATE: dict(begun.state)}, begun.rng, final=True)

    def settle(self) -> None:
        """Waits for the save in flight."""
        self._saver.settle()

    def abandon(self) -> None:
        """Completes the save in flight if the other ranks still can, when an error ends this rank."""
        self._saver.abandon()

    def _save(
        self, step: int, guard_state: Mapping[str, Any], rng: Mapping[str, Tensor], *, final: bool
    ) -> None:
        """Saves a checkpoint; a ``final`` one is complete on return, or raises."""
        stage, result = self.run.stage, self.run.result
        stage.state |= guard_state
        with self.run.pauses.pause("saving"):
            self._before_save(step)
            state = {**stage.state, "val_loss": result.val_loss, "first_val_loss": result.first_val_loss}
            self._saver.save(step, stage.train_module.checkpoint_tensors(), state, rng, final=final)
        self.saved = step


def load_stage(engine: Engine[Any], stage: Stage, path: Path) -> Loaded:
    """Fills model, optimizer and random states of a stage from a checkpoint."""
    loaded = load_checkpoint(path, stage.train_module.checkpoint_tensors(), checksums=False)
    if loaded.rank_tensors is not None:
        set_rng(loaded.rank_tensors, engine.device)
    elif engine.rank == 0:
        print(
            f"resuming on {engine.world_size} ranks a checkpoint of {loaded.world_size} ranks: samples, "
            "weights and optimizer go on exactly, the random state (dropout) starts anew"
        )
    return loaded
