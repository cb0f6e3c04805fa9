"""A balance loss for gates that are dense or change their number of experts.

Letters: T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.routing.balance import Load, switch_loss
from moe.types import LayerContext


def soft_balance_loss(gates_TE: Tensor, ctx: LayerContext) -> Tensor:
    """``E sum_e f_e P_e`` of Switch Transformers (arXiv 2101.03961, Eq. 4), f counted in weight, not tokens.

    f is the share of all combine weight, over the real tokens of all ranks, that an expert gets, without
    gradient; P its mean over this rank's tokens. 1 when balanced, up to E when one expert gets all.

    Args:
        gates_TE: ``[T, E]`` weights that sum to 1, at most; they carry the gradient.
        ctx: For padding and ranks.
    """
    mask_T = ctx.token_mask_T(len(gates_TE))
    with torch.no_grad():
        real_TE = gates_TE if mask_T is None else gates_TE.masked_fill(~mask_T[:, None], 0)
        num_real = real_TE.new_full((1,), len(real_TE)) if mask_T is None else mask_T.sum()[None].to(real_TE)
        packed = torch.cat([real_TE.sum(0), num_real])
        ranks = 1
        if ctx.run.group is not None:
            ranks = ctx.run.group.size()
            torch.distributed.all_reduce(packed, group=ctx.run.group)
        mass = packed[:-1].sum()
        # Shares already, as switch_loss divides by 1 at least and the mass of few tokens may be less.
        shares_E = packed[:-1] / mass.clamp_min(torch.finfo(mass.dtype).tiny)
        load = Load(shares_E, mass.new_ones(()), packed[-1] / ranks)
    return switch_loss(load, gates_TE, mask_T)
