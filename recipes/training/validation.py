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
    from recipes.data.samples import Samples
    from recipes.engines.base import Engine, TrainModule


class Validation(StepHook):
    """Validation of a stage at its beginning, at intervals and at its end."""

    def at_start(self) -> None:
        """Validates the model that no step has changed yet."""
        if self.run.stage.first_step == 0:
            self._evaluate()
            self.run.result.first_val_loss = self.run.result.val_loss

    def after_step(self, step: TrainStep) -> None:
        """Validates if it is due, and after the last step of the stage."""
        train = self.run.stage.train
        if step.done == train.steps or is_due(step.done, train.eval_every):
            self._evaluate()
            step.row |= self.run.result.val_losses

    def _evaluate(self) -> None:
        engine, stage, pauses = self.run.engine, self.run.stage, self.run.pauses
        with pauses.pause("evaluation"):
            found = validation_losses(engine, stage.train_module, stage.data, stage.train, pauses.heartbeat)
        self.run.result.val_losses, self.run.result.val_loss = found, found["val_loss"]


def validation_loss(
    engine: Engine[Any],
    train_module: TrainModule,
    data: TrainData,
    train: TrainConfig,
    heartbeat: Heartbeat | None = None,
) -> float:
    """Returns the validation loss of the data: the first of `validation_losses`. Collective."""
    return validation_losses(engine, train_module, data, train, heartbeat)["val_loss"]


def validation_losses(
    engine: Engine[Any],
    train_module: TrainModule,
    data: TrainData,
    train: TrainConfig,
    heartbeat: Heartbeat | None = None,
) -> dict[str, float]:
    """Returns the mean cross-entropy per target over the first validation samples. Collective.

    The samples are the same for any number of ranks. Of a blend every source gives as many, and the loss is
    the mean of the sources' losses by their shares.

    Args:
        engine: The open engine.
        train_module: The model to evaluate.
        data: Data, whose ``validation`` is read.
        train: Number of samples, and their number at a time.
        heartbeat: Told of every batch.

    Returns:
        ``val_loss``, and for a blend ``val_loss/NAME`` of each source.
    """
    if not data.sources:
        return {
            "val_loss": _mean_loss(
                engine, train_module, data.validation, train.eval_samples, train, heartbeat
            )
        }
    each = _round_up(train.eval_samples, len(data.sources)) // len(data.sources)
    losses = {
        source.name: _mean_loss(engine, train_module, source.validation, each, train, heartbeat)
        for source in data.sources
    }
    mean = sum(float(source.share) * losses[source.name] for source in data.sources)
    return {"val_loss": mean} | {f"val_loss/{name}": loss for name, loss in losses.items()}


def _mean_loss(
    engine: Engine[Any],
    train_module: TrainModule,
    samples: Samples,
    most: int,
    train: TrainConfig,
    heartbeat: Heartbeat | None,
) -> float:
    wanted = min(most, samples.samples_per_epoch)
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
        tokens = samples.batch(start if real == size else 0, size)
        metadata = samples.metadata(start if real == size else 0, size)
        if 0 < real < size:
            tokens[:real] = samples.batch(start, real)
            metadata = metadata and TokenMetadata.together(
                [samples.metadata(start, real), metadata.after(real)]
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
