"""The loss on text that is not trained on."""

from __future__ import annotations

from typing import Any

import torch

from recipes.config.schema import TrainConfig
from recipes.data.build_data import TrainData
from recipes.data.samples import TokenMetadata
from recipes.engines import Engine, TrainModule
from recipes.runtime.heartbeat import ASIDE, Heartbeat
from recipes.tracking.metrics_log import Metric, reduce_metrics


def validation_loss(
    engine: Engine[Any],
    train_module: TrainModule,
    data: TrainData,
    train: TrainConfig,
    heartbeat: Heartbeat | None = None,
) -> float:
    """Mean cross-entropy a target over the first validation samples, the same for any number of ranks.

    Args:
        engine: Open.
        train_module: What is evaluated.
        data: Its ``validation``.
        train: How many samples, and how many at a time.
        heartbeat: Is told of every batch.
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
        # Past the end a rank repeats the first samples with weight 0: sharded models need every rank.
        real = max(0, min(size, wanted - start))
        tokens = data.validation.batch(start if real == size else 0, size)
        metadata = data.validation.metadata(start if real == size else 0, size)
        if 0 < real < size:
            tokens[:real] = data.validation.batch(start, real)
            metadata = metadata and TokenMetadata.together(
                [data.validation.metadata(start, real), metadata.after(real)]
            )
        losses = train_module.token_losses(torch.from_numpy(tokens), metadata)[:real].double()
        weights = torch.ones_like(losses) if metadata is None else metadata.weights_BS[:real].to(losses)
        total += float((losses * weights).sum())
        count += float(weights.sum())
    sums = reduce_metrics({"total": Metric(total, "sum"), "count": Metric(count, "sum")}, engine.data_group)
    return sums["total"] / sums["count"]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
