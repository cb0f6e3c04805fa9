"""Pipeline parallelism: the schedule of the micro-batches, and what pipeline stages send one another.

A single stage is a pipeline as well: the schedule then runs one micro-batch after the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from moe.metrics import LayerStats
from recipes.engines.megatron.rank_groups import RankGroups
from recipes.engines.micro_batch import MicroBatch
from recipes.runtime.ranks import Ranks

ForwardStep: TypeAlias = Callable[[Iterator[MicroBatch], Any], tuple[Tensor, Callable[..., Any]]]


def run_schedule(
    chunk: Any, forward: ForwardStep, batches: Sequence[MicroBatch], *, trains: bool
) -> list[Any]:
    """Runs Megatron's schedule, 1F1B if there are several stages. Collective.

    Args:
        chunk: This rank's stage.
        forward: Takes the remaining micro-batches and the stage. Returns the stage's output, and a function
            that turns it into the loss and a value to report, or into the value alone without training.
        batches: The micro-batches of the step, all of one shape.
        trains: Whether to run backward passes, the last of which completes the gradients.

    Returns:
        The reported value of each micro-batch; empty on all stages but the last.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    left = iter(batches)
    first = next(left)
    samples, tokens = first.tokens_BS1.shape
    found: list[Any] = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=itertools.chain([first], left),
        model=[chunk],
        num_microbatches=len(batches),
        seq_length=tokens - 1,
        micro_batch_size=samples,
        forward_only=not trains,
        collect_non_loss_data=not trains,
    )
    return found


def from_last_stage(found: Sequence[Tensor], shape: Sequence[int], groups: RankGroups, device: Any) -> Tensor:
    """Returns the last stage's results, stacked and in fp32, on all stages. Collective.

    Args:
        found: A tensor for each micro-batch; empty on the other stages.
        shape: Shape of the stacked tensors.
        groups: Groups of this rank.
        device: Device of this rank.
    """
    group = groups.pp_group
    whole = torch.stack(list(found)).float() if found else torch.empty(*shape, device=device)
    assert whole.shape == tuple(shape), (whole.shape, shape)
    if group.size() > 1:
        dist.broadcast(whole, dist.get_global_rank(group, group.size() - 1), group=group)
    return whole


def share_statistics(layers: Sequence[LayerStats], groups: RankGroups, device: torch.device) -> None:
    """Gives each stage the statistics that the MoE layers of the others recorded in a step. Collective.

    Args:
        layers: Statistics of all MoE layers of the model; those of other stages are empty.
        groups: Groups of this rank.
        device: Device of the statistics.
    """
    if groups.pp_group.size() == 1:
        return
    recorded = [(number, layer) for number, layer in enumerate(layers) if layer.sums]
    gathered = Ranks(groups.pp_group).gather(_packed(recorded))
    for stage, (entries, values) in enumerate(gathered):
        if stage != groups.stage:
            _unpack(layers, entries, torch.tensor(values, dtype=torch.float32, device=device))


def _packed(recorded: Sequence[tuple[int, LayerStats]]) -> tuple[list[Any], list[float]]:
    """Returns ``[layer, kind, micro-batch, name, length]`` of each recorded tensor, and all values."""
    entries, tensors = [], []
    for number, layer in recorded:
        named = [("sums", micro, "", x) for micro, x in layer.sums.items()]
        named += [("logit_max", micro, "", x) for micro, x in layer.logit_max.items()]
        named += [
            ("losses", micro, name, x) for micro, losses in layer.losses.items() for name, x in losses.items()
        ]
        for kind, micro, name, tensor in named:
            entries.append([number, kind, micro, name, tensor.numel()])
            tensors.append(tensor.detach().flatten().double())
    # A single copy from the device, however many tensors there are.
    return entries, torch.cat(tensors).tolist() if tensors else []


def _unpack(layers: Sequence[LayerStats], entries: Sequence[Sequence[Any]], values: Tensor) -> None:
    parts = values.split([entry[-1] for entry in entries]) if entries else ()
    for (number, kind, micro, name, _), part in zip(entries, parts, strict=True):
        layer: LayerStats = layers[number]
        if kind == "sums":
            layer.sums[micro] = part
        elif kind == "logit_max":
            layer.logit_max[micro] = part[0]
        else:
            layer.losses.setdefault(micro, {})[name] = part[0]
