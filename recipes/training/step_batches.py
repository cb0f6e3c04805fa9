"""Micro-batches of a step on one rank, read when they are due."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch

from recipes.data.packing import rank_slice
from recipes.engines.base import Engine
from recipes.engines.micro_batch import MicroBatch
from recipes.runtime.heartbeat import FIRST_STEP, Heartbeat
from recipes.training.stage import Stage


class StepBatches(Sequence[MicroBatch]):
    """Sequence of a rank's micro-batches, each of which is read when it is taken.

    Attributes:
        samples: First sample and number of samples of each micro-batch.
    """

    def __init__(self, engine: Engine[Any], stage: Stage, step: int, heartbeat: Heartbeat) -> None:
        """Reads nothing yet.

        Args:
            engine: Knows this rank's place among the ranks.
            stage: The stage that is trained.
            step: Steps before this one.
            heartbeat: Told of each micro-batch.
        """
        train, ranks = stage.train, engine.data_ranks
        size, count = train.micro_size(ranks), train.num_micro_batches(ranks)
        first = stage.first_sample + step * train.global_batch_size
        self._stage = stage
        self._step = step
        self._heartbeat = heartbeat
        # The step's loss is the mean over the counted targets of all its samples; the average over ranks and
        # micro-batches divides it by their number.
        counted = stage.data.train.num_counted(first, train.global_batch_size)
        self._weight = count * ranks / counted
        self.samples = [rank_slice(first, micro, size, engine.data_rank, ranks) for micro in range(count)]

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, index: int) -> MicroBatch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[MicroBatch]: ...
    def __getitem__(self, index: int | slice) -> MicroBatch | Sequence[MicroBatch]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        first, size = self.samples[index]
        self.beat(f"micro-batch {index + 1} of {len(self)}")
        data = self._stage.data.train
        metadata = data.metadata(first, size)
        tokens = torch.from_numpy(data.batch(first, size))
        return MicroBatch(tokens, None if metadata is None else metadata.times(self._weight))

    def beat(self, where: str) -> None:
        """Reports to the heartbeat where in the step this rank is."""
        first = self._step == self._stage.first_step
        self._heartbeat.beat(
            f"{self._stage.name}, step {self._step + 1}, {where}", FIRST_STEP if first else 1.0
        )
