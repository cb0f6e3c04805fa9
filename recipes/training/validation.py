"""Validation: the loss on samples that are not trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from recipes.data.samples import TokenMetadata
from recipes.runtime.heartbeat import ASIDE, Heartbeat
from recipes.tracking.metrics_log import Metric, reduce_metrics
from recipes.training.hooks.base import StepHook, TrainStep, is_due

if TYPE_CHECKING:
    from recipes.config.schema import TrainConfig
    from recipes.data.build_data import TrainData
    from recipes.engines.base import Engine, TrainModule


class Validation(StepHook):
    """Validation of a stage at its beginning, at intervals and at its end."""

    def at_start(self) -> None:
        """Validates the model that no step has changed yet."""
        if self.run.stage.first_step == 0:
            self.run.result.first_val_loss = self._evaluate()

    def after_step(self, step: TrainStep) -> None:
        """Validates if it is due, and after the last step of the stage."""
        train = self.run.stage.train
        if step.done == train.steps or is_due(step.done, train.eval_every):
            step.row["val_loss"] = self._evaluate()

    def _evaluate(self) -> float:
        engine, stage, pauses = self.run.engine, self.run.stage, self.run.pauses
        with pauses.pause("evaluation"):
            loss = validation_loss(engine, stage.train_module, stage.data, stage.train, pauses.heartbeat)
        self.run.result.val_loss = loss
        return loss


def validation_loss(
    engine: Engine[Any],
    train_module: TrainModule,
    data: TrainData,
    train: TrainConfig,
    heartbeat: Heartbeat | None = None,
) -> float:
    """Returns the mean cross-entropy per target over the first validation samples. Collective.

    The samples are the same for any number of ranks.

    Args:
        engine: The open engine.
        train_module: The model to evaluate.
        data: Data, whose ``validation`` is read.
        train: Number of samples, and their number at a time.
        heartbeat: Told of every batch.
    """
    wanted = min(train.eval_samples, data.validation.samples_per_epoch)
    size = train.micro_size(engine.data_ranks)
    total, count, patience = 0.0, 0.0, ASIDE
    for start in range(
        engine.data_rank * size, _round_up(wanted, size * engine.data_ranks), size * engine.data_ranks
    ):
        if heartbeat is not None:
            heartbeat.beat(f"validation, sample {start - engine.data_rank * size}", patience)
            patience = 1.0
        # Past the end a rank repeats the first samples, uncounted: sharded models need every rank.
        real = max(0, min(size, wanted - start))
        tokens = data.validation.batch(start if real == size else 0, size)
        metadata = data.validation.metadata(start if real == size else 0, size)
        if 0 < real < size:
            tokens[:real] = data.validation.batch(start, real)
            metadata = metadata and TokenMetadata.together(
                [data.validation.metadata(start, real), metadata.after(real)]
            )
        losses = train_module.token_losses(torch.from_numpy(tokens), metadata)[:real].double()
        weighted = metadata is not None and metadata.weights_BS is not None
        weights = metadata.weights_BS[:real].to(losses) if weighted else torch.ones_like(losses)
        total += float((losses * weights).sum())
        count += float(weights.sum())
    sums = reduce_metrics({"total": Metric(total, "sum"), "count": Metric(count, "sum")}, engine.data_group)
    return sums["total"] / sums["count"]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
