"""Slices of a layer's experts, one for each rank of an expert-parallel group."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

if TYPE_CHECKING:
    from moe.experts.experts import Experts


@torch.no_grad()
def keep_slice(experts: Experts, mesh: DeviceMesh) -> None:
    """Reduces the experts to this rank's slice; names and global shapes of the parameters stay.

    Args:
        experts: All experts of a layer.
        mesh: One axis of ranks that hold the same weights so far. Their number divides E.
    """
    count, ranks = len(experts.w_down_EDF), mesh.size()
    assert mesh.ndim == 1 and count % ranks == 0, (mesh, count)
    experts.ranks = ranks
    mine = slice(count // ranks * mesh.get_local_rank(), count // ranks * (mesh.get_local_rank() + 1))
    for name, whole in list(experts.named_parameters()):
        # A copy: a view would keep the other ranks' experts in memory.
        # Parameters on the meta device get memory later, for the slice alone.
        part = whole[mine].clone() if whole.is_meta else whole[mine].to(mesh.device_type, copy=True)
        shard = DTensor.from_local(part, mesh, [Shard(0)], run_check=False)
        setattr(experts, name, nn.Parameter(shard, requires_grad=whole.requires_grad))
