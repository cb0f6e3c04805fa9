"""Micro-batches through the stages of a pipeline, and what a stage tells the others.

A single stage is a pipeline as well: the schedule is then one micro-batch after the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from moe.metrics import LayerStats
from recipes.engines.base import MicroBatch
from recipes.engines.megatron.rank_groups import Places
from recipes.runtime.ranks import Ranks

ForwardStep: TypeAlias = Callable[[Iterator[MicroBatch], Any], tuple[Tensor, Callable[..., Any]]]


def run_schedule(
    chunk: Any, forward: ForwardStep, micro_batches: Iterator[MicroBatch], count: int, *, trains: bool
) -> list[Any]:
    """Megatron's schedule, 1F1B where there are several stages. Collective.

    Args:
        chunk: This rank's stage.
        forward: From the micro-batches that are left and the stage, to what the stage computes, and to the
            function of that that gives the loss and what is returned of it, or only the latter where nothing
            is trained.
        micro_batches: All, of one shape.
        count: How many.
        trains: Whether there are backward passes, the last of which completes the gradients.

    Returns:
        Of each micro-batch what that function gave; empty on all stages but the last.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    first = next(micro_batches)
    samples, tokens = first.tokens_BS1.shape
    found: list[Any] = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=itertools.chain([first], micro_batches),
        model=[chunk],
        num_microbatches=count,
        seq_length=tokens - 1,
        micro_batch_size=samples,
        forward_only=not trains,
        collect_non_loss_data=not trains,
    )
    return found


def from_last_stage(found: Sequence[Tensor], shape: Sequence[int], places: Places, device: Any) -> Tensor:
    """What the last stage has found, in fp32, on all stages. Collective.

    Args:
        found: A tensor for each micro-batch; empty on the other stages.
        shape: Of all of them, stacked.
        places: Of this rank.
        device: Of this rank.
    """
    group = places.pipeline_group
    whole = torch.stack(list(found)).float() if found else torch.empty(*shape, device=device)
    assert whole.shape == tuple(shape), (whole.shape, shape)
    if group.size() > 1:
        dist.broadcast(whole, dist.get_global_rank(group, group.size() - 1), group=group)
    return whole


def share_statistics(layers: Sequence[LayerStats], places: Places, device: torch.device) -> None:
    """Gives each stage what the mixtures of the others have recorded in this step. Collective.

    Args:
        layers: Of all mixtures of the model; those of other stages are empty.
        places: Of this rank.
        device: Where statistics lie.
    """
    if places.pipeline_group.size() == 1:
        return
    recorded = [(number, layer) for number, layer in enumerate(layers) if layer.sums]
    told = Ranks(places.pipeline_group).gather(_packed(recorded))
    for stage, (entries, values) in enumerate(told):
        if stage != places.stage:
            _unpack(layers, entries, torch.tensor(values, dtype=torch.float32, device=device))


def _packed(recorded: Sequence[tuple[int, LayerStats]]) -> tuple[list[Any], list[float]]:
    """What is recorded: ``[layer, kind, micro-batch, name, length]`` of each tensor, and all values."""
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
    # One copy from the device, however many there are.
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
