"""Muon for single matrices and for stacks of them, the same on one rank and on many.

`torch.optim.Muon` takes 2-D parameters only, and on sharded parameters its products are summed over ranks in
bf16, so that N ranks differ from one (and a matrix with fewer rows than ranks raises). Here a stack of
expert matrices ``[E, out, in]`` is orthogonalised expert by expert in one batched iteration, and every matrix
is orthogonalised whole.

Letters: N matrices in a stack, A rows, B columns of one matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from recipes.engines.optim.config import Adjustment

Coefficients = tuple[float, float, float]

# The quintic of K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
QUINTIC: Coefficients = (3.4445, -4.7750, 2.0315)
EPS = 1e-7


def orthogonalise(stack_NAB: Tensor, steps: int = 5, coefficients: Coefficients = QUINTIC) -> Tensor:
    """Replaces every matrix of a stack by (nearly) the closest semi-orthogonal one, in bf16.

    The odd quintic ``X <- a X + (b G + c G G) X`` with ``G = X X^T`` is iterated from ``X / |X|_F``; it sends
    all singular values into about [0.7, 1.2] while it keeps the singular vectors. Source: K. Jordan et al.,
    "Muon" (2024), kellerjordan.github.io/posts/muon; `torch.optim.Muon` uses the same constants and dtype.

    Args:
        stack_NAB: ``[N, A, B]``, N may be 0. It is not changed.
        steps: Iterations.
        coefficients: (a, b, c).

    Returns:
        ``[N, A, B]`` bf16.
    """
    a, b, c = coefficients
    x = stack_NAB.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:  # the Gram matrix is taken on the short side
        x = x.mT
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def adjusted_lr(lr: float, rows: int, columns: int, adjustment: Adjustment) -> float:
    """Returns the step size for a matrix of this shape.

    ``original`` multiplies by ``sqrt(max(1, A/B))`` (K. Jordan et al., 2024); ``match_rms_adamw`` by
    ``0.2 sqrt(max(A, B))``, so that the update has the RMS of AdamW's and one learning rate serves both
    (J. Liu et al., "Muon is Scalable for LLM Training", arXiv:2502.16982).
    """
    if adjustment == "original":
        return lr * math.sqrt(max(1.0, rows / columns))
    return lr * 0.2 * math.sqrt(max(rows, columns))


class StackedMuon(torch.optim.Optimizer):
    """Muon over 2-D parameters ``[A, B]`` and stacks ``[N, A, B]``, plain or DTensor.

    The formula (momentum by interpolation, Nesterov, decoupled weight decay, step-size adjustment) is that of
    `torch.optim.Muon`. Of a DTensor stack that is sharded along N, each rank orthogonalises the matrices it
    holds. Any other sharding is first gathered (a stack: exchanged) in bf16, orthogonalised whole, and
    sharded again, so that N ranks give the result of one rank, also for uneven shards.

    The key ``blocks`` of a parameter group is the number of equal matrices that are stored one above the
    other in each matrix of the group, e.g. 2 for gate and up projection. They are orthogonalised separately.

    Args:
        params: Parameters or groups, as for every torch optimizer.
        lr: Step size before the adjustment.
        weight_decay: Decoupled; scaled by the unadjusted ``lr``.
        momentum: Interpolation factor of the momentum buffer.
        nesterov: Look ahead by one interpolation.
        ns_steps: Newton-Schulz iterations.
        adjustment: See `adjusted_lr`.
        blocks: See above.

    Raises:
        ValueError: A parameter is neither 2-D nor 3-D, or its rows do not divide into ``blocks``.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjustment: Adjustment = "match_rms_adamw",
        blocks: int = 1,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "adjustment": adjustment,
            "blocks": blocks,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            for param in group["params"]:
                if param.ndim not in (2, 3):
                    raise ValueError(f"Muon takes [A, B] and [N, A, B]; a parameter is {tuple(param.shape)}")
                if param.shape[-2] % group["blocks"]:
                    raise ValueError(
                        f"{param.shape[-2]} rows do not divide into {group['blocks']} equal matrices "
                        f"(parameter {tuple(param.shape)})"
                    )

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates every parameter that has a gradient. Collective."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, param.grad, group)
        return loss

    def materialise(self, param: Tensor) -> None:
        """Creates the zero state of ``param`` if it has none yet."""
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param, memory_format=torch.preserve_format)

    def _update(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        self.materialise(param)
        grad, weight = local_part(grad), local_part(param)
        buffer = local_part(self.state[param]["momentum_buffer"])
        buffer.lerp_(grad, 1 - group["momentum"])
        update = grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
        update = _orthogonalise_parameter(param, update, group["ns_steps"], group["blocks"])
        rows, columns = param.shape[-2] // group["blocks"], param.shape[-1]
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(update, alpha=-adjusted_lr(group["lr"], rows, columns, group["adjustment"]))


def local_part(tensor: Tensor) -> Tensor:
    """Returns this rank's shard of a DTensor, which shares its memory, or a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _orthogonalise_parameter(param: Tensor, update: Tensor, steps: int, blocks: int) -> Tensor:
    """Orthogonalises this rank's ``update``; matrices that are sharded in ``param`` are gathered first."""
    if not isinstance(param, DTensor):
        return _orthogonalise_whole(update, steps, blocks)
    mesh, placements = param.device_mesh, tuple(param.placements)
    whole = tuple(_uncut(placement, param.ndim) for placement in placements)
    if all(_cuts_no_matrix(placement, param.ndim) for placement in placements):
        return _orthogonalise_whole(update, steps, blocks)
    # The iteration starts from bf16: gathering in bf16 costs half and changes nothing.
    shape, stride = param.shape, param.stride()
    sharded = DTensor.from_local(update.bfloat16(), mesh, placements, shape=shape, stride=stride)
    gathered = sharded.redistribute(placements=whole)
    result = _orthogonalise_whole(gathered.to_local(), steps, blocks)
    full = DTensor.from_local(result.contiguous(), mesh, whole, shape=shape, stride=stride)
    return full.redistribute(placements=placements).to_local()


def _orthogonalise_whole(update: Tensor, steps: int, blocks: int) -> Tensor:
    count = update.shape[0] if update.ndim == 3 else 1
    rows, columns = update.shape[-2] // blocks, update.shape[-1]
    return orthogonalise(update.reshape(count * blocks, rows, columns), steps).reshape(update.shape)


def _cuts_no_matrix(placement: Placement, ndim: int) -> bool:
    # A strided shard (expert parallelism under FSDP) is no `Shard`, but it has a `dim` as well.
    return placement.is_replicate() or (ndim == 3 and getattr(placement, "dim", None) == 0)


def _uncut(placement: Placement, ndim: int) -> Placement:
    return Replicate() if ndim == 2 or placement.is_replicate() else Shard(0)
