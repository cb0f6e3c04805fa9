"""Importance: how much of all gates an expert gets, and the loss that evens it out among the experts.

Sources: Shazeer et al. 2017 (arXiv 1701.06538, Eq. 6-7: the squared coefficient of variation of the gates'
sums over a batch), V-MoE (arXiv 2106.05974, appendix A: of the softmax over all experts). Unlike the Switch
loss it looks at gates alone, and not at which experts were chosen.

Letters: T tokens, E experts, B sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moe.routing.balance import BalanceScope
from moe.routing.step_sums import StepSums
from moe.types import LayerContext


def cv_squared(sums_E: Tensor) -> Tensor:
    """Variance over the squared mean of the experts' sums (Shazeer et al., Eq. 7); 0 when all are 0.

    Args:
        sums_E: ``[..., E]``.
    """
    return sums_E.var(-1, correction=0) / (sums_E.mean(-1).square() + 1e-10)


def importance_loss(
    scope: BalanceScope, gates_TE: Tensor, ctx: LayerContext, history: StepSums | None = None
) -> Tensor:
    """The squared coefficient of variation of importance: 0 when even, E - 1 when one expert has all.

    It has no divisor but the mean importance of an expert, so that its value does not depend on the number of
    tokens, nor on whether gates sum to 1.

    Args:
        scope: The tokens that importance is summed over. ``micro_batch``: those of all ranks;
            ``global_batch``: of the micro-batches of the step up to this one, of all ranks; ``sequence``: of
            each sequence by itself, then the mean over sequences. As `moe.routing.balance.balance_loss` has
            it.
        gates_TE: ``[T, E]``, at least 0; they carry the gradient.
        ctx: Padding, ranks, and the shape of the batch.
        history: The layer's; needed by ``global_batch``.

    Returns:
        A scalar, without coefficient. Averaged over ranks its gradient is that of one rank with all tokens.
    """
    mask_T = ctx.token_mask_T(len(gates_TE))
    if mask_T is not None:
        gates_TE = gates_TE * mask_T[:, None]
    if scope == "sequence":
        gates_BSE = gates_TE.view(ctx.num_sequences(len(gates_TE)), -1, gates_TE.shape[1])
        sums_BE = gates_BSE.sum(1, dtype=torch.float64)
        return cv_squared(sums_BE).mean().to(gates_TE.dtype)
    # The variance is a small difference of sums: in fp32 their order would show in the sixth digit.
    local_E = gates_TE.sum(0, dtype=torch.float64)
    sums_E = sum_over_ranks(local_E, ctx.run.group)
    if scope == "global_batch":
        assert history is not None, "scope=global_batch sums over micro-batches, and got no history"
        history.write(ctx.run, sums_E)
        sums_E = history.so_far(ctx.run) + (sums_E - sums_E.detach())
    return cv_squared(sums_E).to(gates_TE.dtype)


def sum_over_ranks(local: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum over ranks; its gradient is this rank's part times the ranks, since gradients are averaged."""
    if group is None:
        return local
    total = local.detach().clone()
    torch.distributed.all_reduce(total, group=group)
    return total + group.size() * (local - local.detach())
