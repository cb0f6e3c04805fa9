"""Sharding of a model by the native engine: first experts, then attention, then the rest by FSDP2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from recipes.engines.native.expert_parallel import apply_ep, average_gradients, row_sharded
from recipes.engines.native.parallel_dims import Meshes
from recipes.engines.native.tensor_parallel import (
    apply_tp,
    share_random_state,
    split_tokens,
    sum_partial_gradients,
)
from recipes.models.hf.ffn_blocks import decoder_blocks
from recipes.models.hf.hf_model import HFModel


@dataclass(frozen=True)
class GradientSync:
    """Synchronisation that FSDP2 does not do for expert-parallel and tensor-parallel modules.

    Attributes:
        experts: Experts that are sharded over ``ep`` ranks.
        ep: Number of these ranks.
        partial: Modules whose gradients each tensor-parallel rank computes a part of.
        tp_group: Ranks that see the same samples; None without tensor parallelism.
    """

    experts: Sequence[nn.Module] = ()
    ep: int = 1
    partial: Sequence[nn.Module] = ()
    tp_group: ProcessGroup | None = None

    def begin_step(self, device: torch.device) -> None:
        """Gives ranks that see the same samples the same random state. Collective."""
        if self.tp_group is not None:
            share_random_state(device, self.tp_group)

    def finish_step(self) -> None:
        """Turns the gradients that FSDP2 leaves into those of the mean loss over all samples."""
        average_gradients(self.experts, self.ep)
        if self.tp_group is not None:
            sum_partial_gradients(self.partial, self.tp_group.size())


def parallelize(model: HFModel, meshes: Meshes, policy: MixedPrecisionPolicy) -> GradientSync:
    """Shards a model: inner modules first, since FSDP2 skips what is sharded already.

    Args:
        model: Changed in place. Its parameters may have no memory yet.
        meshes: Of all ranks.
        policy: Dtypes of products and reductions; routers stay in fp32.
    """
    sync = GradientSync()
    if meshes.experts is not None:
        # The inputs must not be cast: combine weights stay in fp32.
        experts = apply_ep(model, meshes.experts, replace(policy, cast_forward_inputs=False))
        sync = replace(sync, experts=experts, ep=meshes.experts.ep.size())
    if meshes.attention is not None:
        partial = apply_tp(model, meshes.attention, policy)
        ep = None if meshes.experts is None else meshes.experts.ep
        partial += split_tokens(model, meshes.attention.tp, ep)
        sync = replace(sync, partial=partial, tp_group=meshes.attention.tp.get_group())
    if policy.param_dtype is not None:
        fp32 = MixedPrecisionPolicy(cast_forward_inputs=False)
        for layer in model.routed_layers():
            fully_shard(layer.router, mesh=meshes.weights, mp_policy=fp32)
    apply_fsdp(model, meshes.weights, policy)
    return sync


def apply_fsdp(model: HFModel, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """Shards each block by FSDP2, and then the rest of the model.

    Args:
        model: Modules that are sharded already stay as they are.
        mesh: Its last axis shards; an axis before it replicates.
        policy: Dtypes of what is sharded here.
    """
    rows = row_sharded(model, mesh.size(mesh.ndim - 1))
    for block in decoder_blocks(model.module, model.config):
        fully_shard(
            block,
            mesh=mesh,
            mp_policy=policy,
            shard_placement_fn=lambda parameter: Shard(1) if parameter in rows else Shard(0),
        )
    fully_shard(model.module, mesh=mesh, mp_policy=policy)


def gather_when_called(model: nn.Module) -> None:
    """Lets each module of a model that does not train gather its weights when it is called."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # FSDP2 frees weights that were gathered by name at once, and not with the next layer's.
            module.register_forward_pre_hook(lambda module, args: module.unshard(), prepend=True)
