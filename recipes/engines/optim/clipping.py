"""Gradient clipping that is the same on one rank and on many."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from recipes.engines.optim.muon import local_part


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
    parts = [
        (members, [] if place is None else [place[0].get_group(dim) for dim in place[1]])
        for place, members in places.items()
    ]
    return clip_parts(parts, max_norm, parts[0][0][0].device)


@torch.no_grad()
def clip_parts(
    parts: Iterable[tuple[Sequence[Tensor], Sequence[ProcessGroup]]],
    max_norm: float | None,
    device: torch.device,
) -> Tensor:
    """As `clip_grad_norm`, for gradients whose ranks are told. Collective.

    Args:
        parts: Gradients that this rank holds, maybe none, with the groups over whose ranks the rest of them
            lies. Without groups, all ranks hold the same.
        max_norm: None measures only.
        device: Of the gradients.

    Returns:
        The norm before clipping: a plain 0-d fp32 tensor.
    """
    parts = list(parts)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for members, groups in parts:
        squares = torch.zeros((), dtype=torch.float64, device=device)
        if members:
            norms = torch._foreach_norm(list(members), 2, dtype=torch.float32)
            squares = torch.stack(norms).double().square().sum()
        for group in groups:
            dist.all_reduce(squares, group=group)
        total += squares
    norm = total.sqrt().float()
    if max_norm is not None:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        factor = torch.where(torch.isfinite(norm), factor, 1.0)
        for members, _ in parts:
            if members:
                torch._foreach_mul_(list(members), factor)
    return norm


def _sharded_over(grad: Tensor) -> tuple[DeviceMesh, tuple[int, ...]] | None:
    """The mesh and those of its axes over which the gradient is cut; None when every rank holds all of it."""
    if not isinstance(grad, DTensor):
        return None
    partial = [place for place in grad.placements if place.is_partial()]
    assert not partial, f"a gradient is not reduced yet: {grad.placements}"
    axes = tuple(axis for axis, place in enumerate(grad.placements) if not place.is_replicate())
    return (grad.device_mesh, axes) if axes else None
