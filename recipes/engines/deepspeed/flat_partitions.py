"""Positions of the parameters in the flat partitions that ZeRO gives each rank."""

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
    """Consecutive elements of a parameter that a rank updates; empty if other ranks update all of it.

    Attributes:
        name: Name of the parameter.
        shape: Shape of what ZeRO splits: the parameter, or this rank's slice of the experts.
        start: Index of the first element in the flattened parameter.
        length: Number of elements.
        offset: Index of the first element in the rank's partition.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    offset: int

    def shard(self, flat: Tensor, ep: DeepSpeedEP) -> FlatShard:
        """Returns the shard of the whole parameter in a flat tensor that is laid out like the partition."""
        shape, row = ep.place(self.name, self.shape)
        start = row * math.prod(shape[1:]) + self.start
        return FlatShard(flat[self.offset : self.offset + self.length], shape, start)


@dataclass(frozen=True, eq=False)
class Partition:
    """Elements of one parameter group that a rank updates.

    Attributes:
        group: The optimizer's parameter group.
        weights: ``[N]`` this rank's part of the flattened group; it shares memory with the model's weights.
        runs: One run for each parameter of the group, in order.
    """

    group: dict[str, Any]
    weights: Tensor
    runs: tuple[Run, ...]


def replicated_partitions(zero: Any, names: Mapping[int, str]) -> list[Partition]:
    """Returns the partitions of ZeRO-1 and ZeRO-2, which flatten, pad and split each group evenly.

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
    """Returns the partitions of ZeRO-3, which pads and splits each parameter, and then joins the parts.

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
    """Returns the elements of a parameter that a rank holds under ZeRO-3; the last ranks may hold none.

    Args:
        param: Parameter that DeepSpeed has split.
        name: Name of the parameter.
        offset: See `Run`.
    """
    size = param.partition_numel()
    start = min(dist.get_rank(param.ds_process_group) * size, param.ds_numel)
    return Run(name, tuple(param.ds_shape), start, min(size, param.ds_numel - start), offset)


class StepCounts:
    """Step counts of the parameters of a partition, which has a single count for all of them.

    A checkpoint has one count for each parameter: it saves, or overwrites, copies. The next update takes what
    was written into them.
    """

    def __init__(self) -> None:
        self._given: list[tuple[Tensor, list[Tensor]]] = []

    def forget(self) -> None:
        """Drops the copies that were given."""
        self._given.clear()

    def give(self, live: Tensor, names: Iterator[str]) -> dict[str, GlobalTensor]:
        """Returns a copy for each name."""
        copies = {name: live.clone() for name in names}
        self._given.append((live, list(copies.values())))
        return dict(copies)

    def take(self) -> None:
        """Takes over the largest count that was written into the copies.

        A parameter without gradients in some steps has a lower count; its moments are zero, so that the count
        of the others serves it as well.
        """
        for live, copies in self._given:
            live.copy_(torch.stack(copies).max())
        self.forget()


def state_tensors(
    optimizer: torch.optim.Optimizer, partitions: list[Partition], ep: DeepSpeedEP, counts: StepCounts
) -> dict[str, GlobalTensor]:
    """Returns the optimizer's live state, under the names that it has in checkpoints of every engine."""
    tensors: dict[str, GlobalTensor] = {}
    for partition in partitions:
        materialise_adamw(optimizer, partition.weights)
        for key, value in optimizer.state[partition.weights].items():
            if value.ndim == 0:
                tensors |= counts.give(value, (f"optim.{run.name}.{key}" for run in partition.runs))
            else:
                tensors |= {f"optim.{run.name}.{key}": run.shard(value, ep) for run in partition.runs}
    return tensors
