"""Means over real tokens: for losses, whose divisor all ranks share, and for figures of this rank.

Letters: T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.types import LayerContext


def loss_mean(values_T: Tensor, ctx: LayerContext) -> Tensor:
    """The sum over real tokens divided by the real tokens *per rank*, padding left out.

    The average over ranks of its gradient is then the gradient of the mean over all tokens, however many
    each rank has.
    """
    mask_T = ctx.token_mask_T(len(values_T))
    with torch.no_grad():
        divisor = torch.full((), len(values_T), dtype=values_T.dtype, device=values_T.device)
        if mask_T is not None:
            divisor = mask_T.sum().to(values_T.dtype)
        if ctx.run.group is not None:
            torch.distributed.all_reduce(divisor, group=ctx.run.group)
            divisor /= ctx.run.group.size()
    return _real(values_T, mask_T).sum() / divisor.clamp_min(torch.finfo(values_T.dtype).tiny)


@torch.no_grad()
def figure_mean(values_T: Tensor, ctx: LayerContext) -> Tensor:
    """The mean over this rank's real tokens; 0 where there is none."""
    mask_T = ctx.token_mask_T(len(values_T))
    count = max(len(values_T), 1) if mask_T is None else mask_T.sum().clamp_min(1)
    return _real(values_T, mask_T).sum() / count


def _real(values_T: Tensor, mask_T: Tensor | None) -> Tensor:
    # Filled, not multiplied: what stands in padding may not be finite.
    return values_T if mask_T is None else values_T.masked_fill(~mask_T, 0)
