"""Expert parallelism of the native engine: each of ``ep`` neighbouring ranks holds a slice of the experts.

FSDP2 shards each slice over the ranks that hold the same one (`recipes.engines.native.parallel_dims`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from moe.dispatch.all_to_all import AllToAllDispatcher
from moe.errors import ModelError
from moe.experts.expert_slices import keep_slice
from moe.experts.experts import Experts
from recipes.engines.optim.muon import local_part
from recipes.models.hf.hf_model import HFModel

_PATH = "engine.expert_parallel"


@dataclass(frozen=True)
class ExpertMeshes:
    """Device meshes of the experts.

    Attributes:
        dp: Ranks that hold the same slice: the last axis shards it, an axis before that replicates it.
        ep: Ranks that together hold all experts, on one axis.
    """

    dp: DeviceMesh
    ep: DeviceMesh


def apply_ep(model: HFModel, meshes: ExpertMeshes, policy: MixedPrecisionPolicy) -> list[Experts]:
    """Shards the experts of every layer, and sends their tokens by all-to-all.

    Call it before FSDP2 shards a module that contains experts.

    Args:
        model: With the same weights on all ranks.
        meshes: Of all ranks.
        policy: Dtype of the experts' products; it must not cast their inputs (combine weights stay fp32).

    Returns:
        The experts of every layer.

    Raises:
        ModelError: FSDP2 cannot shard a slice over the ranks that hold the same one.
    """
    assert not policy.cast_forward_inputs, policy
    sharded = []
    for _, layer in model.moe_layers():
        dim = shard_dim(layer.experts, meshes.dp.size(meshes.dp.ndim - 1), meshes.ep.size())
        keep_slice(layer.experts, meshes.ep)
        layer.set_dispatcher(AllToAllDispatcher(layer.router.num_experts, meshes.ep.get_group()))
        fully_shard(
            layer.experts,
            mesh=meshes.dp,
            mp_policy=policy,
            shard_placement_fn=lambda parameter, dim=dim: Shard(dim),
        )
        sharded.append(layer.experts)
    return sharded


def shard_dim(experts: Experts, copies: int, ranks: int) -> int:
    """Returns the axis that FSDP2 shards: experts if there are enough of them, else output features.

    Args:
        experts: Not sharded yet.
        copies: Number of ranks over which FSDP2 shards the same experts.
        ranks: Number of ranks that together hold all experts.

    Raises:
        ModelError: Neither axis divides.
    """
    count = len(experts.w_down_EDF)
    if count // ranks % copies == 0:
        return 0
    rows = {name: weight.shape[1] for name, weight in experts.named_parameters()}
    if uneven := {name: size for name, size in rows.items() if size % copies}:
        rule = (
            f"neither the {count // ranks} experts of a rank nor the rows of their weights {uneven} divide "
            f"over the {copies} ranks that hold the same experts"
        )
        remedy = "Set another expert_parallel, or start another number of ranks."
        raise ModelError.one(_PATH, ranks, rule, remedy)
    return 1


def row_sharded(model: HFModel, ranks: int) -> set[nn.Parameter]:
    """Returns the expert weights that FSDP2 shards by output features, so that all ranks hold equal parts.

    Sharded by experts, eight of them would leave half of sixteen ranks empty.

    Args:
        model: Not sharded yet by FSDP2; expert-parallel experts are left out.
        ranks: Number of ranks over which FSDP2 shards.
    """
    found: set[nn.Parameter] = set()
    for _, layer in model.moe_layers():
        weights = list(layer.experts.parameters())
        whole = not any(isinstance(weight, DTensor) for weight in weights)
        if whole and len(weights[0]) % ranks and not any(weight.shape[1] % ranks for weight in weights):
            found.update(weights)
    return found


def gathered(tensor: DTensor) -> Tensor:
    """Returns the full tensor on every rank. Collective.

    The axes of its mesh are gathered one by one: torch warns when nested shards are gathered at once.
    """
    placements = list(tensor.placements)
    for axis in range(len(placements)):
        placements[axis] = Replicate()
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()


@torch.no_grad()
def average_gradients(experts: Iterable[nn.Module], expert_parallel: int) -> None:
    """Divides the gradients of experts by the number of ``ep`` ranks, to get means over all ranks.

    FSDP2 leaves means over ``dp``, but each slice has seen the tokens of all ``ep`` ranks, each of which
    divides its loss by its own number of tokens.
    """
    parameters = (parameter for module in experts for parameter in module.parameters())
    grads = [local_part(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if grads:
        torch._foreach_div_(grads, float(expert_parallel))
