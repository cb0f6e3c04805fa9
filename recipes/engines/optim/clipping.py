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
    number, without a synchronisation of device and host. Plain parameters must have the same gradient on
    every rank. Gradients are multiplied by ``max_norm / (norm + 1e-6)``, as in
    `torch.nn.utils.clip_grad_norm_`, unless the norm is not finite: the caller skips such a step.

    Args:
        parameters: Parameters; those without a gradient do not count.
        max_norm: Largest norm; None only measures.

    Returns:
        The norm before clipping: a plain 0-d fp32 tensor on the gradients' device.
    """
    grads = [param.grad for param in parameters if param.grad is not None]
    if not grads:
        return torch.zeros(())
    by_sharding: dict[tuple[DeviceMesh, tuple[int, ...]] | None, list[Tensor]] = defaultdict(list)
    for grad in grads:
        by_sharding[_sharded_over(grad)].append(local_part(grad))
    parts = [
        (members, [] if over is None else [over[0].get_group(axis) for axis in over[1]])
        for over, members in by_sharding.items()
    ]
    return clip_parts(parts, max_norm, parts[0][0][0].device)


@torch.no_grad()
def clip_parts(
    parts: Iterable[tuple[Sequence[Tensor], Sequence[ProcessGroup]]],
    max_norm: float | None,
    device: torch.device,
) -> Tensor:
    """Does what `clip_grad_norm` does, for gradients whose groups of ranks are given. Collective.

    Args:
        parts: Gradients of this rank, maybe none, with the groups over whose ranks they are sharded. Without
            groups, all ranks hold the same gradients.
        max_norm: Largest norm; None only measures.
        device: Device of the gradients.

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
    """Returns the mesh, and its axes over which a gradient is sharded; None if every rank holds all of it."""
    if not isinstance(grad, DTensor):
        return None
    partial = [place for place in grad.placements if place.is_partial()]
    assert not partial, f"a gradient is not reduced yet: {grad.placements}"
    axes = tuple(axis for axis, place in enumerate(grad.placements) if not place.is_replicate())
    return (grad.device_mesh, axes) if axes else None
