"""The training loop: one for every model, engine and recipe.

Which samples a step takes, its learning rate and everything else is a function of the step alone, so that a
resumed leg goes on as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.errors import GraftError
from moe.stats import LoadReport, report_load
from recipes.callbacks.base import Callback, LegInfo
from recipes.checkpoint import load_checkpoint, save_checkpoint
from recipes.data.build import TrainData
from recipes.data.packing import rank_slice
from recipes.data.samples import Marks
from recipes.engines import Engine, Trainable
from recipes.interrupt import StopRequest
from recipes.metrics import Metric, reduce_metrics
from recipes.optim import OptimConfig, lr_factor
from recipes.run_meters import RunMeters, WindowFigures
from recipes.schema import TrainConfig
from recipes.step_costs import Costs, StepCosts
from recipes.step_figures import StepFigures, StepWork, router_figures


class DivergedError(GraftError):
    """The loss or the gradient is not finite; nothing was updated by it."""


@dataclass
class Leg:
    """One model's training within a run.

    Attributes:
        name: ``dense``, ``moe`` or ``cpt``.
        title: For people.
        train: Steps, batch and intervals.
        optim: Optimizer and schedule.
        data: Samples.
        trainable: The model under its engine.
        costs: What a token costs, at the end where that changes.
        scheduled_costs: What it costs from each of these steps on, ascending from 0; empty where that is
            ``costs`` throughout.
        step_costs: What the sparsity-aware figures need; None to leave them out.
        checkpoints: Folder of its checkpoints.
        state: What every checkpoint carries besides tensors: identity of the run, reports.
        first_step: Steps done already.
        first_sample: The sample that step 0 begins with: past those that the model was trained on before.
        seed: Of dropout and the like; each rank has its own, and a resumed leg goes on with what was saved.
    """

    name: str
    title: str
    train: TrainConfig
    optim: OptimConfig
    data: TrainData
    trainable: Trainable
    costs: Costs
    checkpoints: Path
    state: dict[str, Any] = field(default_factory=dict)
    scheduled_costs: Sequence[tuple[int, Costs]] = ()
    step_costs: StepCosts | None = None
    first_step: int = 0
    first_sample: int = 0
    seed: int = 0

    @property
    def tokens_per_step(self) -> int:
        """Over all ranks."""
        return self.train.global_batch_size * self.data.train.seq_len

    def costs_at(self, step: int) -> Costs:
        """What a token costs in a step that has so many before it."""
        begun = [costs for start, costs in self.scheduled_costs if start <= step]
        return begun[-1] if begun else self.costs


@dataclass
class LegResult:
    """How a leg ended.

    Attributes:
        finished: Whether all steps were done; False when it was asked to stop.
        step: Steps done.
        val_loss: Of the last validation.
        first_val_loss: Of the validation before the first step; None when resumed past it.
        tokens_per_s: Median over the steps of this process.
        missing: Figures that no row has, and why.
    """

    finished: bool
    step: int
    val_loss: float | None
    first_val_loss: float | None
    tokens_per_s: float | None
    missing: dict[str, str] = field(default_factory=dict)


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
    ) -> None:
        """Without ``meters`` memory and energy are not measured."""
        self.engine = engine
        self.callbacks = callbacks
        self.stop = stop
        self.meters = meters
        self.first_step_time: float | None = None
        self.spent = {"evaluation": 0.0, "saving": 0.0}
        self._window = WindowFigures()

    def resume(self, leg: Leg, path: Path) -> dict[str, Any]:
        """Fills the leg from a checkpoint and returns the state that was saved with it."""
        loaded = load_checkpoint(path, leg.trainable.checkpoint_tensors(), checksums=False)
        leg.first_step = loaded.step
        leg.trainable.host.context.step = loaded.step
        if loaded.rank_tensors is not None:
            _set_rng(loaded.rank_tensors, self.engine.device)
        elif self.engine.rank == 0:
            print(
                f"resuming on {self.engine.world_size} ranks what {loaded.world_size} ranks saved: samples, "
                "weights and optimizer go on exactly, the random state (dropout) starts anew"
            )
        return loaded.state

    def run(self, leg: Leg) -> LegResult:
        """Trains a leg to its end, or until a stop is requested; either way a checkpoint is left."""
        info = LegInfo(leg.name, leg.title, leg.train.steps, leg.first_step, leg.tokens_per_step)
        result = LegResult(
            False, leg.first_step, leg.state.get("val_loss"), leg.state.get("first_val_loss"), None
        )
        for callback in self.callbacks:
            callback.on_leg_start(info)
        try:
            self._train(leg, info, result)
        finally:
            for callback in self.callbacks:
                callback.on_leg_end(info)
        return result

    def _train(self, leg: Leg, info: LegInfo, result: LegResult) -> None:
        speeds: list[float] = []
        figures = StepFigures(leg.step_costs, leg.costs, speaks=self.engine.rank == 0)
        if leg.first_step == 0:
            # Not what the legs before have left: those may have been trained by another process.
            torch.manual_seed(leg.seed + self.engine.rank)
            with self._aside("evaluation"):
                result.val_loss = result.first_val_loss = self.evaluate(leg)
            self._emit(info, {"step": 0, "tokens": 0, "val_loss": result.val_loss}, None)
        self._begin_window()
        step, saved, stopping = leg.first_step, leg.first_step, False
        while step < leg.train.steps and not stopping:
            row, load, stopping = self._step(leg, step, figures)
            step += 1
            speeds.append(row["tokens_per_s"])
            result.tokens_per_s = sorted(speeds)[len(speeds) // 2]
            self.first_step_time = self.first_step_time or time.time()
            last = step == leg.train.steps
            if last or _due(step, leg.train.eval_every):
                with self._aside("evaluation"):
                    result.val_loss = row["val_loss"] = self.evaluate(leg)
            self._emit(info, row, load)
            result.step = step
            if last or stopping or _due(step, leg.train.save_every):
                with self._aside("saving"):
                    self._save(leg, info, step, result)
                saved = step
        result.finished = step >= leg.train.steps
        result.missing = figures.missing() | ({} if self.meters is None else self.meters.reasons)
        assert saved == step, f"step {step} was not saved, the last was {saved}"

    @contextlib.contextmanager
    def _aside(self, kind: str) -> Iterator[None]:
        """Work between steps: its time and energy are not theirs."""
        started = time.perf_counter()
        yield
        self.spent[kind] += time.perf_counter() - started
        if self.meters is not None:
            self.meters.between()

    def _begin_window(self) -> None:
        self._window.begin_leg()
        if self.meters is not None:
            self.meters.between()

    def _ends_window(self, leg: Leg, step: int) -> bool:
        """Whether meters are read behind this step: where lines are printed, and before other work."""
        every = (leg.train.log_every, leg.train.eval_every, leg.train.save_every)
        return step == leg.train.steps or any(_due(step, number) for number in every)

    def _step(
        self, leg: Leg, step: int, figures: StepFigures
    ) -> tuple[dict[str, float], LoadReport | None, bool]:
        started = time.perf_counter()
        count = leg.train.num_micro_batches(self.engine.world_size)
        share = self._share(leg, step, count)
        losses = [
            leg.trainable.forward_backward(*self._micro_batch(leg, step, micro, count, share))
            for micro in range(count)
        ]
        factor = lr_factor(step, leg.train.steps, leg.optim.schedule)
        grad_norm = float(leg.trainable.step(factor))
        loss = torch.stack(losses).mean()
        measured = {"loss": Metric(loss, "mean"), "stop": Metric(float(self.stop.requested), "max")}
        metered = self.meters is not None and self._ends_window(leg, step + 1)
        if self.meters is not None and metered:
            measured |= self.meters.of_window()
        reduced = reduce_metrics(measured, self.engine.data_group)
        host, group = leg.trainable.host, self.engine.data_group
        load = report_load([(index, layer.stats) for index, layer in host.moe_layers()], group)
        attention = report_load([(index, layer.stats) for index, layer in host.attention_layers()], group)
        seconds = time.perf_counter() - started
        self._refuse_nonfinite(leg, step, reduced["loss"], grad_norm)
        speed = leg.tokens_per_step / seconds
        row = {
            "step": step + 1,
            "tokens": (step + 1) * leg.tokens_per_step,
            "loss": reduced["loss"],
            "lr": leg.optim.lr * factor,
            "grad_norm": grad_norm,
            "tokens_per_s": speed,
            "step_s": seconds,
        }
        ranks = self.engine.world_size
        work = StepWork(leg.tokens_per_step, seconds, ranks, count * ranks, load, attention)
        row |= figures.of_step(leg.costs_at(step), work)
        self._window.add_tokens(leg.tokens_per_step)
        if metered:
            row |= self._window.of_row(reduced)
        row |= router_figures(load) | router_figures(attention, "attention/")
        return row, load, reduced["stop"] > 0

    def _refuse_nonfinite(self, leg: Leg, step: int, loss: float, grad_norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        raise DivergedError(
            f"{leg.title}: at step {step + 1} the loss is {loss} and the gradient norm {grad_norm}; the "
            f"weights were not updated. Checkpoints are in {leg.checkpoints}: lower optim.lr (now "
            f"{leg.optim.lr}) or raise optim.schedule.warmup_steps, and set resume=auto."
        )

    def _share(self, leg: Leg, step: int, num_micro: int) -> float:
        """What a counted target weighs in its rank's and micro-batch's sum.

        The step's loss is the mean over the counted targets of all ranks and micro-batches together, however
        they are spread; the average over ranks and micro-batches has divided it by their number already.
        """
        first = leg.first_sample + step * leg.train.global_batch_size
        counted = leg.data.train.num_counted(first, leg.train.global_batch_size)
        return num_micro * self.engine.world_size / counted

    def _micro_batch(
        self, leg: Leg, step: int, micro: int, num_micro: int, share: float
    ) -> tuple[Tensor, int, int, Marks | None]:
        """What this rank's forward pass takes."""
        size = leg.train.micro_size(self.engine.world_size)
        of_step = leg.first_sample + step * leg.train.global_batch_size
        first, count = rank_slice(of_step, micro, size, self.engine.rank, self.engine.world_size)
        marks = leg.data.train.marks(first, count)
        tokens = torch.from_numpy(leg.data.train.batch(first, count))
        return tokens, micro, num_micro, None if marks is None else marks.times(share)

    def evaluate(self, leg: Leg) -> float:
        """Mean validation loss a token, over all ranks; the same samples whatever their number."""
        return validation_loss(self.engine, leg.trainable, leg.data, leg.train)

    def _emit(self, info: LegInfo, row: dict[str, float], load: LoadReport | None) -> None:
        for callback in self.callbacks:
            callback.on_row(info, row, load)

    def _save(self, leg: Leg, info: LegInfo, step: int, result: LegResult) -> None:
        for callback in self.callbacks:
            callback.before_checkpoint(info, step)
        figures = {"val_loss": result.val_loss, "first_val_loss": result.first_val_loss}
        save_checkpoint(
            leg.checkpoints,
            step,
            leg.trainable.checkpoint_tensors(),
            leg.state | figures,
            _rng(self.engine.device),
            keep_last=leg.train.keep_last,
        )


def validation_loss(engine: Engine[Any], trainable: Trainable, data: TrainData, train: TrainConfig) -> float:
    """Mean cross-entropy a target over the first validation samples, the same for any number of ranks."""
    wanted = min(train.eval_samples, data.validation.samples_per_epoch)
    size = train.micro_size(engine.world_size)
    total, count = 0.0, 0.0
    for start in range(
        engine.rank * size, _round_up(wanted, size * engine.world_size), size * engine.world_size
    ):
        # Past the end a rank repeats the first samples with weight 0: sharded models need every rank.
        real = max(0, min(size, wanted - start))
        tokens = data.validation.batch(start if real == size else 0, size)
        marks = data.validation.marks(start if real == size else 0, size)
        if 0 < real < size:
            tokens[:real] = data.validation.batch(start, real)
            marks = marks and Marks.together([data.validation.marks(start, real), marks.after(real)])
        losses = trainable.token_losses(torch.from_numpy(tokens), marks)[:real].double()
        weights = torch.ones_like(losses) if marks is None else marks.weights_BS[:real].to(losses)
        total += float((losses * weights).sum())
        count += float(weights.sum())
    sums = reduce_metrics({"total": Metric(total, "sum"), "count": Metric(count, "sum")}, engine.data_group)
    return sums["total"] / sums["count"]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


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
