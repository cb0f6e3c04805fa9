"""Importance, an expert's share of all gates, and the loss that evens it out.

Sources: Shazeer et al. 2017 (arXiv 1701.06538, Eq. 6-7: the squared coefficient of variation of the gates'
sums over a batch), V-MoE (arXiv 2106.05974, appendix A: sums of the softmax over all experts). Unlike the
Switch loss it depends on gates alone, not on which experts were chosen.

Letters: T tokens, E experts, B sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moe.routing.scope import BalanceScope
from moe.routing.step_state import StepSums
from moe.types import LayerContext


def cv_squared(sums_E: Tensor) -> Tensor:
    """Computes the variance of the experts' sums over their squared mean (Shazeer et al., Eq. 7); 0 for 0/0.

    Args:
        sums_E: ``[..., E]``.
    """
    return sums_E.var(-1, correction=0) / (sums_E.mean(-1).square() + 1e-10)


def importance_loss(
    scope: BalanceScope, gates_TE: Tensor, ctx: LayerContext, history: StepSums | None = None
) -> Tensor:
    """Computes the squared coefficient of variation of importance: 0 if even, E - 1 if one expert has all.

    Its only divisor is the mean importance of an expert, so that its value depends neither on the number of
    tokens nor on the gates' sum.

    Args:
        scope: The tokens that importance is summed over, as in `moe.routing.balance.balance_loss`.
        gates_TE: ``[T, E]``, at least 0; they carry the gradient.
        ctx: Padding, ranks, and the shape of the batch.
        history: The layer's sums over the step, for ``global_batch``.

    Returns:
        A scalar, without coefficient. Its gradient averaged over ranks is that of one rank with all tokens.
    """
    mask_T = ctx.token_mask_T(len(gates_TE))
    if mask_T is not None:
        gates_TE = gates_TE * mask_T[:, None]
    if scope == "sequence":
        gates_BSE = gates_TE.view(ctx.num_sequences(len(gates_TE)), -1, gates_TE.shape[1])
        sums_BE = gates_BSE.sum(1, dtype=torch.float64)
        return cv_squared(sums_BE).mean().to(gates_TE.dtype)
    # In fp64: the variance is a small difference, whose sixth digit depends on the order of sums in fp32.
    local_E = gates_TE.sum(0, dtype=torch.float64)
    sums_E = sum_over_ranks(local_E, ctx.run.group)
    if scope == "global_batch":
        assert history is not None, "scope=global_batch sums over micro-batches, and got no history"
        history.write(ctx.run, sums_E)
        sums_E = history.so_far(ctx.run) + (sums_E - sums_E.detach())
    return cv_squared(sums_E).to(gates_TE.dtype)


def sum_over_ranks(local: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sums over ranks; the gradient is this rank's part times the ranks, since gradients are averaged."""
    if group is None:
        return local
    total = local.detach().clone()
    torch.distributed.all_reduce(total, group=group)
    return total + group.size() * (local - local.detach())
