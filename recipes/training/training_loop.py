"""The training loop: one for every model, engine and recipe.

The samples of a step, its learning rate and everything else are functions of the step alone, so that a
resumed stage goes on as if it had never stopped. Guards, meters, validation and checkpoints are hooks around
the step.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moe.metrics import LoadReport, report_load
from recipes.checkpoint import step_name
from recipes.engines.base import Engine
from recipes.engines.optim.optimizer import lr_factor
from recipes.runtime.clock import steady_time
from recipes.runtime.cpu_memory import give_back_memory
from recipes.runtime.interrupt import StopRequest
from recipes.tracking.metrics_log import Metric, reduce_metrics
from recipes.tracking.run_meters import RunMeters, WindowFigures
from recipes.training.callbacks.base import Callback, StageInfo
from recipes.training.guards.run_guards import RunGuards
from recipes.training.guards.stage_guard import DivergedError, StageGuard
from recipes.training.hooks.base import Pauses, StageContext, StepHook, TrainStep
from recipes.training.hooks.blend_shares import BlendShares
from recipes.training.hooks.recovery import Recovery
from recipes.training.hooks.stage_meters import StageMeters
from recipes.training.hooks.stage_saves import StageSaves, load_stage
from recipes.training.stage import Stage, StageResult
from recipes.training.step_batches import StepBatches
from recipes.training.validation import Validation, validation_loss

__all__ = ["DivergedError", "Stage", "StageResult", "Loop", "validation_loss"]


class Loop:
    """Trains stages, one after the other, on one engine.

    Attributes:
        first_step_time: `steady_time` at the end of the first step of this process.
        planned: Stages of the run in order, with their steps, as far as the job knows them.
        spent: Seconds of this process between steps, by kind: ``evaluation``, ``saving``, ``going_back``.
    """

    def __init__(
        self,
        engine: Engine[Any],
        callbacks: Sequence[Callback],
        stop: StopRequest,
        meters: RunMeters | None = None,
        guards: RunGuards | None = None,
    ) -> None:
        """Without ``meters`` memory and energy are not measured; without ``guards`` hangs go undetected."""
        self.engine = engine
        self.callbacks = callbacks
        self.stop = stop
        self.meters = meters
        self.guards = guards or RunGuards()
        self.first_step_time: float | None = None
        self.planned: dict[str, int] = {}
        self._pauses = Pauses(self.guards.heartbeat, meters)
        self._window = WindowFigures()

    @property
    def spent(self) -> dict[str, float]:
        """See the class."""
        return self._pauses.spent

    def resume(self, stage: Stage, path: Path) -> dict[str, Any]:
        """Fills a stage from a checkpoint, and returns the state that was saved with it."""
        loaded = load_stage(self.engine, stage, path)
        parent = f"{loaded.run or 'unknown'}/{step_name(loaded.step)}"
        stage.origin = dataclasses.replace(stage.origin, parent=parent)
        stage.first_step = stage.train_module.model.context.step = loaded.step
        return loaded.state

    def run(self, stage: Stage) -> StageResult:
        """Trains a stage to its end, or until a stop is requested; both leave a checkpoint."""
        info = self._describe(stage)
        result = StageResult(
            False, stage.first_step, stage.state.get("val_loss"), stage.state.get("first_val_loss"), None
        )
        for callback in self.callbacks:
            callback.on_stage_start(info)
        run = StageContext(self.engine, stage, result, self._pauses)
        guard = StageGuard(run, self.guards)

        def before_save(step: int) -> None:
            for callback in self.callbacks:
                callback.before_checkpoint(info, step)

        saves = StageSaves(run, guard, before_save)
        meters = StageMeters(run, self.meters, self._window)
        hooks: list[StepHook] = [guard, meters, Recovery(run, guard, saves), Validation(run), saves]
        hooks.append(BlendShares(run))
        try:
            with self.guards.heartbeat.training():
                self._train(stage, info, result, hooks)
        except Exception:
            saves.abandon()
            raise
        finally:
            for callback in self.callbacks:
                callback.on_stage_end(info)
        return result

    def _describe(self, stage: Stage) -> StageInfo:
        names = list(self.planned)
        later = names[names.index(stage.name) + 1 :] if stage.name in names else names
        return StageInfo(
            stage.name,
            stage.title,
            stage.train.steps,
            stage.first_step,
            stage.tokens_per_step,
            {name: self.planned[name] for name in later},
        )

    def _train(self, stage: Stage, info: StageInfo, result: StageResult, hooks: Sequence[StepHook]) -> None:
        if stage.first_step == 0:
            # The random state that earlier stages left may be that of another process.
            torch.manual_seed(stage.seed + self.engine.rank)
        if self.engine.device.type == "cpu":
            give_back_memory()  # what making the model has left
        for hook in hooks:
            hook.at_start()
        if stage.first_step == 0:
            self._emit(info, {"step": 0, "tokens": 0, **result.val_losses}, None)
        speeds: list[float] = []
        stopping = False
        while result.step < stage.train.steps and not stopping:
            step = self.train_step(stage, result.step, hooks)
            speeds.append(step.row["tokens_per_s"])
            result.tokens_per_s = sorted(speeds)[len(speeds) // 2]
            self.first_step_time = self.first_step_time or steady_time()
            stopping = step.last = step.done == stage.train.steps or step.reduced["stop"] > 0
            for hook in hooks:
                hook.after_step(step)
            self._emit(info, step.row, step.load)
            result.step = step.done
            for hook in hooks:
                hook.after_row(step)
            if self.engine.device.type == "cpu":
                give_back_memory()
        result.finished = result.step >= stage.train.steps
        for hook in hooks:
            hook.at_end()

    def train_step(self, stage: Stage, number: int, hooks: Sequence[StepHook] = ()) -> TrainStep:
        """Does one optimizer step. Collective.

        Args:
            stage: The model with its optimizer, data and settings.
            number: Steps before this one.
            hooks: Hooks, whose methods are called in the order of this list.

        Returns:
            The step, with its row of figures over all ranks.
        """
        step = TrainStep(number)
        module, group = stage.train_module, self.engine.data_group
        batches = StepBatches(self.engine, stage, number, self.guards.heartbeat)
        batches.beat("its beginning")
        for hook in hooks:
            hook.before_step(step)
        # Set anew at each step: a skipped step does not advance it, but counts.
        module.model.context.step = number
        step.losses, step.samples = module.forward_backward(batches), batches.samples
        batches.beat("the loss of all ranks")
        measured = {"loss": Metric(torch.stack(step.losses).mean(), "mean")}
        measured["stop"] = Metric(float(self.stop.requested), "max")
        for hook in hooks:
            measured |= hook.after_gradients(step)
        # Reduced before the update, which no rank may do when the loss of one is not finite.
        step.reduced = reduce_metrics(measured, group)
        for hook in hooks:
            hook.before_update(step)
        factor = lr_factor(number, stage.train.steps, stage.optim.schedule)
        batches.beat("the update")
        step.grad_norm = float(module.step(factor, step.norm_limit))
        module.model.context.step = step.done
        batches.beat("the figures")
        for hook in hooks:
            hook.after_update(step)
        model = module.model
        step.load = report_load([(i, layer.stats) for i, layer in model.moe_layers()], group)
        step.attention = report_load([(i, layer.stats) for i, layer in model.attention_layers()], group)
        step.seconds = time.perf_counter() - step.started
        step.row = _row(stage, step, stage.optim.lr * factor)
        for hook in hooks:
            step.row |= hook.figures(step)
        batches.beat("its row")
        return step

    def _emit(self, info: StageInfo, row: dict[str, float], load: LoadReport | None) -> None:
        for callback in self.callbacks:
            callback.on_row(info, row, load)


def _row(stage: Stage, step: TrainStep, lr: float) -> dict[str, float]:
    return {
        "step": step.done,
        "tokens": step.done * stage.tokens_per_step,
        "loss": step.reduced["loss"],
        "lr": lr,
        "grad_norm": step.grad_norm,
        "tokens_per_s": stage.tokens_per_step / step.seconds,
        "step_s": step.seconds,
    }
