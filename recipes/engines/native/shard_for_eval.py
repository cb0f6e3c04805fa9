"""A host cut block by block by FSDP2, and how it is then called without training."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from recipes.engines.native.expert_parallel import cut_by_rows
from recipes.models.hf.ffn_blocks import decoder_blocks
from recipes.models.hf.hf_model import HFModel


def cut_blocks(model: HFModel, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """Cuts each block, and then what is left of the model.

    Args:
        model: Modules that are cut already stay as they are.
        mesh: Its last axis cuts; one before it holds copies.
        policy: Of what is cut here.
    """
    rows = cut_by_rows(model, mesh.size(mesh.ndim - 1))
    for block in decoder_blocks(model.module, model.config):
        fully_shard(
            block,
            mesh=mesh,
            mp_policy=policy,
            shard_placement_fn=lambda parameter: Shard(1) if parameter in rows else Shard(0),
        )
    fully_shard(model.module, mesh=mesh, mp_policy=policy)


def gather_when_called(model: nn.Module) -> None:
    """Has the modules of a model that is only looked at gather their weights by themselves."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Asked for by name, what has been gathered is let go at once, and not with the next layer's.
            module.register_forward_pre_hook(lambda module, args: module.unshard(), prepend=True)
