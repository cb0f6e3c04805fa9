"""Where the parameters lie in the flat partitions that ZeRO gives each rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from recipes.checkpoint import FlatShard, GlobalTensor
from recipes.engines.deepspeed.zero_experts import DeepSpeedEP
from recipes.engines.optim.optimizer import materialise_adamw


@dataclass(frozen=True, eq=False)
class Run:
    """The elements of a parameter that a rank updates; none of them where it is another rank's.

    Attributes:
        name: Of the parameter.
        shape: Of what is cut: the parameter, or this rank's slice of the experts.
        start: The first of them, in the flattened parameter.
        length: How many.
        offset: Where they lie in the rank's partition.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    offset: int

    def shard(self, flat: Tensor, spread: DeepSpeedEP) -> FlatShard:
        """What of the whole parameter, over all ranks, a flat tensor laid out alike holds."""
        shape, row = spread.place(self.name, self.shape)
        start = row * math.prod(shape[1:]) + self.start
        return FlatShard(flat[self.offset : self.offset + self.length], shape, start)


@dataclass(frozen=True, eq=False)
class Partition:
    """What a rank updates of one parameter group.

    Attributes:
        group: The optimizer's.
        weights: ``[N]`` this rank's part of the flattened group, the memory of the model's own weights.
        runs: One for each parameter of the group, in order.
    """

    group: dict[str, Any]
    weights: Tensor
    runs: tuple[Run, ...]


def replicated_partitions(zero: Any, names: Mapping[int, str]) -> list[Partition]:
    """Those of ZeRO-1 and ZeRO-2: a group is flattened, padded and cut into equal parts.

    Args:
        zero: DeepSpeed's optimizer of these stages.
        names: ``id`` of a parameter to its name.
    """
    found = []
    for i, group in enumerate(zero.optimizer.param_groups):
        size = zero.partition_size[i]
        low = dist.get_rank(zero.real_dp_process_group[i]) * size
        runs = []
        placed = zip(zero.round_robin_bit16_groups[i], zero.round_robin_bit16_offsets[i], strict=True)
        for param, first in placed:
            start = min(max(low - first, 0), param.numel())
            stop = min(max(low + size - first, 0), param.numel())
            offset = max(first - low, 0) if stop > start else 0
            runs.append(Run(names[id(param)], tuple(param.shape), start, stop - start, offset))
        found.append(Partition(group, zero.single_partition_of_fp32_groups[i], tuple(runs)))
    return found


def sharded_partitions(zero: Any, names: Mapping[int, str]) -> list[Partition]:
    """Those of ZeRO-3: each parameter is padded and cut on its own, and the parts are laid one by one.

    Args:
        zero: DeepSpeed's optimizer of this stage.
        names: ``id`` of a parameter to its name.
    """
    found = []
    for i, params in enumerate(zero.fp16_groups):
        group = zero.optimizer.param_groups[zero.sub_group_to_group_id[i]]
        runs, offset = [], 0
        for param in params:
            runs.append(sharded_run(param, names[id(param)], offset))
            offset += param.partition_numel()
        found.append(Partition(group, zero.fp32_partitioned_groups_flat[i], tuple(runs)))
    return found


def sharded_run(param: Any, name: str, offset: int = 0) -> Run:
    """What a rank holds of a parameter under ZeRO-3: the last ranks hold less, or nothing.

    Args:
        param: As DeepSpeed has cut it.
        name: Its name.
        offset: Where the part lies.
    """
    size = param.partition_numel()
    start = min(dist.get_rank(param.ds_process_group) * size, param.ds_numel)
    return Run(name, tuple(param.ds_shape), start, min(size, param.ds_numel - start), offset)


class StepCounts:
    """The step counts of parameters, of which a partition has one for them all.

    A checkpoint has a count for each parameter. What is given away to be saved or overwritten are copies; the
    next update asks whether they were overwritten.
    """

    def __init__(self) -> None:
        self._given: list[tuple[Tensor, list[Tensor]]] = []

    def forget(self) -> None:
        """Nothing that was given away matters any more."""
        self._given.clear()

    def give(self, live: Tensor, names: Iterator[str]) -> dict[str, GlobalTensor]:
        """A copy for each name."""
        copies = {name: live.clone() for name in names}
        self._given.append((live, list(copies.values())))
        return dict(copies)

    def take(self) -> None:
        """Puts back what was written into the copies.

        A parameter that had no gradient in some steps has counted fewer; its moments are zero, and the count
        of the others serves it as well.
        """
        for live, copies in self._given:
            live.copy_(torch.stack(copies).max())
        self.forget()


def state_tensors(
    optimizer: torch.optim.Optimizer, partitions: list[Partition], spread: DeepSpeedEP, counts: StepCounts
) -> dict[str, GlobalTensor]:
    """The optimizer's live state under the names that a checkpoint gives it on every engine."""
    tensors: dict[str, GlobalTensor] = {}
    for partition in partitions:
        materialise_adamw(optimizer, partition.weights)
        for key, value in optimizer.state[partition.weights].items():
            if value.ndim == 0:
                tensors |= counts.give(value, (f"optim.{run.name}.{key}" for run in partition.runs))
            else:
                tensors |= {f"optim.{run.name}.{key}": run.shard(value, spread) for run in partition.runs}
    return tensors
