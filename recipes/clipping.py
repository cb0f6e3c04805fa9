"""Gradient clipping that is the same on one rank and on many."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from recipes.muon import local_part


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scales all gradients, in place, so that their common norm is at most ``max_norm``.

    The 2-norm is taken over all parameters and, for DTensors, over all ranks; every rank gets the same
    number, and no device is synchronised with the host. Plain parameters must hold the same gradient on every
    rank. A norm that is not finite is returned as it is and the gradients are left alone: the caller skips
    the step (as `torch.nn.utils.clip_grad_norm_`, it multiplies by ``max_norm / (norm + 1e-6)``).

    Args:
        parameters: Those with a gradient count.
        max_norm: None measures only.

    Returns:
        The norm before clipping: a plain 0-d fp32 tensor on the gradients' device.
    """
    grads = [param.grad for param in parameters if param.grad is not None]
    if not grads:
        return torch.zeros(())
    places: dict[tuple[DeviceMesh, tuple[int, ...]] | None, list[Tensor]] = defaultdict(list)
    for grad in grads:
        places[_sharded_over(grad)].append(local_part(grad))
    total = torch.zeros((), dtype=torch.float64, device=local_part(grads[0]).device)
    for place, members in places.items():
        norms = torch._foreach_norm(members, 2, dtype=torch.float32)
        squares = torch.stack(norms).double().square().sum()
        if place is not None:
            mesh, dims = place
            for dim in dims:
                dist.all_reduce(squares, group=mesh.get_group(dim))
        total += squares
    norm = total.sqrt().float()
    if max_norm is not None:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        factor = torch.where(torch.isfinite(norm), factor, 1.0)
        for members in places.values():
            torch._foreach_mul_(members, factor)
    return norm


def _sharded_over(grad: Tensor) -> tuple[DeviceMesh, tuple[int, ...]] | None:
    """The mesh and those of its axes over which the gradient is cut; None when every rank holds all of it."""
    if not isinstance(grad, DTensor):
        return None
    partial = [place for place in grad.placements if place.is_partial()]
    assert not partial, f"a gradient is not reduced yet: {grad.placements}"
    axes = tuple(axis for axis, place in enumerate(grad.placements) if not place.is_replicate())
    return (grad.device_mesh, axes) if axes else None
