"""Expert parallelism of the native engine: each rank of a group holds a slice of the experts.

The ranks form a grid (expert_dp, ep), ep inside: neighbouring ranks hold the slices of one copy of the
experts, and FSDP2 shards each slice over the ranks that hold the same one
(`recipes.engines.native.parallel_dims`).
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
from moe.errors import Mistake, ModelError
from moe.experts.expert_slices import keep_slice
from moe.experts.experts import Experts
from moe.routers import RouterConfig, router_class
from recipes.engines.optim.muon import local_part
from recipes.models.hf.hf_model import HFModel

_PATH = "engine.expert_parallel"


@dataclass(frozen=True)
class ExpertMeshes:
    """The ranks as the experts see them.

    Attributes:
        copies: Ranks that hold the same slice: the last axis cuts it, an axis before that holds copies.
        ranks: One axis of ranks that hold all experts between them.
    """

    copies: DeviceMesh
    ranks: DeviceMesh

    @property
    def cutters(self) -> int:
        """Ranks over which a slice is cut."""
        return self.copies.size(self.copies.ndim - 1)


def rank_unsupported_reason(expert_parallel: int, world_size: int) -> str | None:
    """Why so many ranks cannot be such a grid, as "field=value: rule. Remedy."."""
    if world_size % expert_parallel == 0:
        return None
    return (
        f"expert_parallel={expert_parallel}: {world_size} ranks do not divide into groups of so many. "
        f"Set a divisor of {world_size}, or start a multiple of {expert_parallel} ranks"
    )


def moe_mistakes(expert_parallel: int, num_experts: int, router: RouterConfig) -> list[Mistake]:
    """Why such a mixture cannot be spread over so many ranks."""
    if expert_parallel == 1:
        return []
    mistakes = []
    if num_experts % expert_parallel:
        rule = f"the {num_experts} experts of upcycle.num_experts do not divide over so many ranks"
        remedy = f"Set a divisor of {num_experts}, or another upcycle.num_experts."
        mistakes.append(Mistake(_PATH, expert_parallel, rule, remedy))
    if router_class(router.name).reads_experts(router):
        rule = f"router={router.name} reads the weights of all experts, and no rank holds them all"
        remedy = "Set engine.expert_parallel=1, or choose another router."
        mistakes.append(Mistake(_PATH, expert_parallel, rule, remedy))
    return mistakes


def apply_ep(model: HFModel, grid: ExpertMeshes, policy: MixedPrecisionPolicy) -> list[Experts]:
    """Leaves each rank its slice of every layer's experts, and lets the tokens travel; returns the experts.

    To be called before anything that holds the experts is sharded.

    Args:
        model: With the same weights on all ranks.
        grid: Of all ranks.
        policy: Of the experts' products; their inputs must not be cast (combine weights stay fp32).

    Raises:
        ModelError: FSDP2 cannot cut the experts over the ranks that hold the same ones.
    """
    assert not policy.cast_forward_inputs, policy
    spread = []
    for _, layer in model.moe_layers():
        dim = cut_dim(layer.experts, grid.cutters, grid.ranks.size())
        keep_slice(layer.experts, grid.ranks)
        layer.set_dispatcher(AllToAllDispatcher(layer.router.num_experts, grid.ranks.get_group()))
        fully_shard(
            layer.experts,
            mesh=grid.copies,
            mp_policy=policy,
            shard_placement_fn=lambda parameter, dim=dim: Shard(dim),
        )
        spread.append(layer.experts)
    return spread


def cut_dim(experts: Experts, copies: int, ranks: int) -> int:
    """The axis that FSDP2 cuts: experts apart where there are enough of them, else their output features.

    Args:
        experts: Not spread yet.
        copies: Ranks over which FSDP2 is to cut the same experts.
        ranks: Ranks that are to hold all of them between them.

    Raises:
        ModelError: Neither divides.
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


def cut_by_rows(model: HFModel, ranks: int) -> set[nn.Parameter]:
    """Experts' weights that FSDP2 is to cut by their output features, so that all ranks hold equally much.

    Cut by experts, eight of them over sixteen ranks would leave half of the ranks empty.

    Args:
        model: Not sharded yet; experts that are spread already are left out.
        ranks: Over which FSDP2 cuts.
    """
    found: set[nn.Parameter] = set()
    for _, layer in model.moe_layers():
        weights = list(layer.experts.parameters())
        whole = not any(isinstance(weight, DTensor) for weight in weights)
        if whole and len(weights[0]) % ranks and not any(weight.shape[1] % ranks for weight in weights):
            found.update(weights)
    return found


def gathered(tensor: DTensor) -> Tensor:
    """All of a tensor, on every rank. Collective.

    The axes of its mesh are undone one by one, from the last cut to the first: torch warns of a cut within a
    cut that it is to undo at once.
    """
    placements = list(tensor.placements)
    for axis in range(len(placements)):
        placements[axis] = Replicate()
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()


@torch.no_grad()
def average_gradients(experts: Iterable[nn.Module], expert_parallel: int) -> None:
    """Makes means over all ranks of what FSDP2 has left: sums over ep, and means over copies.

    An expert's gradient is of the tokens of all ranks of its group, each of which has divided its loss by its
    own tokens alone.
    """
    parameters = (parameter for module in experts for parameter in module.parameters())
    grads = [local_part(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if grads:
        torch._foreach_div_(grads, float(expert_parallel))
