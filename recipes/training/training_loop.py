"""The training loop: one for every model, engine and recipe.

Which samples a step takes, its learning rate and everything else is a function of the step alone, so that a
resumed leg goes on as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from moe.metrics import LoadReport, report_load
from recipes.checkpoint import Retention, Saver, find_checkpoint, load_checkpoint
from recipes.data.packing import rank_slice
from recipes.engines import Engine, MicroBatch
from recipes.engines.optim.optimizer import lr_factor
from recipes.runtime.heartbeat import ASIDE, FIRST_STEP
from recipes.runtime.interrupt import StopRequest
from recipes.tracking.metrics_log import Metric, reduce_metrics
from recipes.tracking.run_meters import RunMeters, WindowFigures
from recipes.tracking.step_figures import StepFigures, StepWork, router_figures
from recipes.training.callbacks.base import Callback, StageInfo
from recipes.training.guards.run_guards import RunGuards
from recipes.training.guards.stage_guard import STATE, DivergedError, StageGuard
from recipes.training.guards.step_guard import StepJudgement, Verdict
from recipes.training.stage import Stage, StageResult
from recipes.training.validation import validation_loss

__all__ = ["DivergedError", "Stage", "StageResult", "Loop", "validation_loss"]


@dataclass(frozen=True)
class _Done:
    """A step that is done."""

    row: dict[str, float]
    load: LoadReport | None
    stopping: bool
    judgement: StepJudgement


class Loop:
    """Trains legs, one after the other, on one engine.

    Attributes:
        first_step_time: When the first step of this process ended, by ``time.time()``.
        spent: Seconds of this process that went into ``evaluation`` and ``saving`` while training.
    """

    def __init__(
        self,
        engine: Engine[Any],
        callbacks: Sequence[Callback],
        stop: StopRequest,
        meters: RunMeters | None = None,
        guards: RunGuards | None = None,
    ) -> None:
        """Without ``meters`` memory and energy are not measured; without ``guards`` hangs are not seen."""
        self.engine = engine
        self.callbacks = callbacks
        self.stop = stop
        self.meters = meters
        self.guards = guards or RunGuards()
        self.first_step_time: float | None = None
        self.spent = {"evaluation": 0.0, "saving": 0.0, "going_back": 0.0}
        self._window = WindowFigures()
        self._saver: Saver | None = None

    @property
    def _saves(self) -> Saver:
        assert self._saver is not None, "checkpoints are saved while a leg runs"
        return self._saver

    def resume(self, stage: Stage, path: Path) -> dict[str, Any]:
        """Fills the leg from a checkpoint and returns the state that was saved with it."""
        loaded = load_checkpoint(path, stage.train_module.checkpoint_tensors(), checksums=False)
        stage.first_step = loaded.step
        stage.train_module.model.context.step = loaded.step
        if loaded.rank_tensors is not None:
            _set_rng(loaded.rank_tensors, self.engine.device)
        elif self.engine.rank == 0:
            print(
                f"resuming on {self.engine.world_size} ranks what {loaded.world_size} ranks saved: samples, "
                "weights and optimizer go on exactly, the random state (dropout) starts anew"
            )
        return loaded.state

    def run(self, stage: Stage) -> StageResult:
        """Trains a leg to its end, or until a stop is requested; either way a checkpoint is left."""
        info = StageInfo(stage.name, stage.title, stage.train.steps, stage.first_step, stage.tokens_per_step)
        result = StageResult(
            False, stage.first_step, stage.state.get("val_loss"), stage.state.get("first_val_loss"), None
        )
        for callback in self.callbacks:
            callback.on_stage_start(info)
        best = "val_loss" if stage.train.keep_best else None
        keep = Retention(stage.train.keep_last, best)
        self._saver = Saver(stage.checkpoints, keep, background=stage.train.async_save)
        try:
            with self.guards.heartbeat.training():
                self._train(stage, info, result)
        except Exception:
            self._saver.abandon()
            raise
        finally:
            for callback in self.callbacks:
                callback.on_stage_end(info)
        return result

    def _train(self, stage: Stage, info: StageInfo, result: StageResult) -> None:
        speeds: list[float] = []
        figures = StepFigures(stage.step_costs, stage.costs, verbose=self.engine.rank == 0)
        guard = StageGuard(self.engine, self.guards, stage)
        if stage.first_step == 0:
            # Not what the legs before have left: those may have been trained by another process.
            torch.manual_seed(stage.seed + self.engine.rank)
            with self._aside("evaluation"):
                result.val_loss = result.first_val_loss = self.evaluate(stage)
            self._emit(info, {"step": 0, "tokens": 0, "val_loss": result.val_loss}, None)
        self._begin_window()
        step, saved, stopping = stage.first_step, stage.first_step, False
        while step < stage.train.steps and not stopping:
            done = self._step(stage, step, figures, guard)
            if guard.problem is not None:
                self._end(stage, info, result, guard, saved)
            step, row, stopping = step + 1, done.row, done.stopping
            speeds.append(row["tokens_per_s"])
            result.tokens_per_s = sorted(speeds)[len(speeds) // 2]
            self.first_step_time = self.first_step_time or time.time()
            if guard.goes_back(done.judgement):
                self._go_back(stage, step, guard, row)
            last = step == stage.train.steps
            if last or _due(step, stage.train.eval_every):
                with self._aside("evaluation"):
                    result.val_loss = row["val_loss"] = self.evaluate(stage)
            row |= self._saves.figures()
            self._emit(info, row, done.load)
            result.step = step
            if last or stopping or _due(step, stage.train.save_every):
                stage.state |= guard.state()
                with self._aside("saving"):
                    self._save(stage, info, step, result, final=last or stopping)
                saved = step
        result.finished = step >= stage.train.steps
        result.missing = figures.missing() | ({} if self.meters is None else self.meters.reasons)
        assert saved == step, f"step {step} was not saved, the last was {saved}"

    def _end(
        self, stage: Stage, info: StageInfo, result: StageResult, guard: StageGuard, saved: int
    ) -> NoReturn:
        """Leaves a checkpoint from before the steps that went wrong, then raises why the run ends."""
        assert guard.problem is not None and guard.begun is not None, "a step has begun, and found a problem"
        begun = guard.begun
        if begun.step > saved:
            # Nothing has been updated since: with the random state of then, it is as if they had not been.
            _set_rng(dict(begun.rng), self.engine.device)
            stage.state[STATE] = dict(begun.state)
            with self._aside("saving"):
                self._save(stage, info, begun.step, result, final=True)
        raise guard.problem

    def _go_back(self, stage: Stage, step: int, guard: StageGuard, row: dict[str, float]) -> None:
        """Takes the weights of the newest checkpoint, and goes on behind the samples that were seen since."""
        with self._aside("going_back"):
            self._saves.settle()
            found = find_checkpoint(stage.checkpoints)
            if found.path is None:
                self._log(f"{stage.title}: there is no checkpoint to go back to")
                return
            first = stage.first_step
            guard.went_back(self.resume(stage, found.path))
            row["went_back_to"] = stage.first_step
            stage.first_step = first
            stage.train_module.model.context.step = step
        self._log(f"{stage.title}: gone back to {found.path}; the samples since then are not taken again")

    def _log(self, line: str) -> None:
        if self.engine.rank == 0:
            print(line, flush=True)

    @contextlib.contextmanager
    def _aside(self, kind: str) -> Iterator[None]:
        """Work between steps: its time and energy are not theirs."""
        self.guards.heartbeat.beat(kind, ASIDE)
        started = time.perf_counter()
        yield
        self.spent[kind] += time.perf_counter() - started
        if self.meters is not None:
            self.meters.between()

    def _begin_window(self) -> None:
        self._window.begin_stage()
        if self.meters is not None:
            self.meters.between()

    def _ends_window(self, stage: Stage, step: int) -> bool:
        """Whether meters are read behind this step: where lines are printed, and before other work."""
        every = (stage.train.log_every, stage.train.eval_every, stage.train.save_every)
        return step == stage.train.steps or any(_due(step, number) for number in every)

    def _step(self, stage: Stage, step: int, figures: StepFigures, guard: StageGuard) -> _Done:
        started = time.perf_counter()
        self._beat(stage, step, "its beginning")
        model, group = stage.train_module.model, self.engine.data_group
        guard.begin(step, _rng(self.engine.device))
        # A function of the step alone, whatever became of those before: a resumed leg has no other.
        model.context.step = step
        losses, samples = self._gradients(stage, step)
        self._beat(stage, step, "the loss of all ranks")
        measured = {"loss": Metric(torch.stack(losses).mean(), "mean")}
        measured |= {"stop": Metric(float(self.stop.requested), "max")} | guard.measures()
        # Before the update, which must not happen on any rank when the loss of one is not finite.
        reduced = reduce_metrics(measured, group)
        factor = lr_factor(step, stage.train.steps, stage.optim.schedule)
        self._beat(stage, step, "the update")
        grad_norm = float(stage.train_module.step(factor, guard.norm_limit(reduced)))
        model.context.step = step + 1
        self._beat(stage, step, "the figures")
        judgement = guard.judge(step, reduced, grad_norm, losses, samples)
        metered = self._read_meters(stage, step)
        load = report_load([(index, layer.stats) for index, layer in model.moe_layers()], group)
        attention = report_load([(index, layer.stats) for index, layer in model.attention_layers()], group)
        seconds = time.perf_counter() - started
        row = {
            "step": step + 1,
            "tokens": (step + 1) * stage.tokens_per_step,
            "loss": reduced["loss"],
            "lr": stage.optim.lr * factor,
            "grad_norm": grad_norm,
            "tokens_per_s": stage.tokens_per_step / seconds,
            "step_s": seconds,
            "skipped_steps": judgement.skipped,
        }
        if judgement.verdict is not Verdict.UPDATED:
            row["skipped"] = 1
        ranks = self.engine.world_size
        passes = len(losses) * self.engine.data_ranks
        work = StepWork(stage.tokens_per_step, seconds, ranks, passes, load, attention)
        row |= figures.of_step(stage.costs_at(step), work)
        self._window.add_tokens(stage.tokens_per_step)
        row |= self._window.of_row(metered) if metered else {}
        row |= router_figures(load) | router_figures(attention, "attention/")
        self._beat(stage, step, "its row")
        return _Done(row, load, reduced["stop"] > 0, judgement)

    def _gradients(self, stage: Stage, step: int) -> tuple[list[Tensor], list[tuple[int, int]]]:
        """Losses of this rank's micro-batches, and their first sample and number of samples."""
        count = stage.train.num_micro_batches(self.engine.data_ranks)
        losses = stage.train_module.forward_backward(self._micro_batches(stage, step, count), count)
        return losses, [self._samples(stage, step, micro) for micro in range(count)]

    def _micro_batches(self, stage: Stage, step: int, count: int) -> Iterator[MicroBatch]:
        """What this rank's forward passes take; each is read when it is due."""
        share = self._share(stage, step, count)
        for micro in range(count):
            self._beat(stage, step, f"micro-batch {micro + 1} of {count}")
            first, size = self._samples(stage, step, micro)
            metadata = stage.data.train.metadata(first, size)
            tokens = torch.from_numpy(stage.data.train.batch(first, size))
            yield MicroBatch(tokens, None if metadata is None else metadata.times(share))

    def _read_meters(self, stage: Stage, step: int) -> dict[str, float]:
        """Behind the update, where memory is at its peak; empty where no meters are read after this step."""
        if self.meters is None or not self._ends_window(stage, step + 1):
            return {}
        return reduce_metrics(self.meters.of_window(), self.engine.data_group)

    def _beat(self, stage: Stage, step: int, where: str) -> None:
        patience = FIRST_STEP if step == stage.first_step else 1.0
        self.guards.heartbeat.beat(f"{stage.name}, step {step + 1}, {where}", patience)

    def _share(self, stage: Stage, step: int, num_micro: int) -> float:
        """What a counted target weighs in its rank's and micro-batch's sum.

        The step's loss is the mean over the counted targets of all ranks and micro-batches together, however
        they are spread; the average over ranks and micro-batches has divided it by their number already.
        """
        first = stage.first_sample + step * stage.train.global_batch_size
        counted = stage.data.train.num_counted(first, stage.train.global_batch_size)
        return num_micro * self.engine.data_ranks / counted

    def _samples(self, stage: Stage, step: int, micro: int) -> tuple[int, int]:
        """The first of this rank's samples, and how many."""
        size = stage.train.micro_size(self.engine.data_ranks)
        of_step = stage.first_sample + step * stage.train.global_batch_size
        return rank_slice(of_step, micro, size, self.engine.data_rank, self.engine.data_ranks)

    def evaluate(self, stage: Stage) -> float:
        """Mean validation loss a token, over all ranks; the same samples whatever their number."""
        return validation_loss(
            self.engine, stage.train_module, stage.data, stage.train, self.guards.heartbeat
        )

    def _emit(self, info: StageInfo, row: dict[str, float], load: LoadReport | None) -> None:
        for callback in self.callbacks:
            callback.on_row(info, row, load)

    def _save(self, stage: Stage, info: StageInfo, step: int, result: StageResult, *, final: bool) -> None:
        """Saves, in the background if so configured; what is ``final`` is complete on return, or raises."""
        for callback in self.callbacks:
            callback.before_checkpoint(info, step)
        figures = {"val_loss": result.val_loss, "first_val_loss": result.first_val_loss}
        tensors, own = stage.train_module.checkpoint_tensors(), _rng(self.engine.device)
        self._saves.save(step, tensors, stage.state | figures, own, final=final)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _rng(device: torch.device) -> dict[str, Tensor]:
    states = {"rng_cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["rng_cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_rng(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["rng_cpu"])
    if device.type == "cuda" and "rng_cuda" in states:
        torch.cuda.set_rng_state(states["rng_cuda"], device)
