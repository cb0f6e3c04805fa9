"""The balance loss of Sigma-MoE-Tiny, which flat probabilities cannot satisfy.

Letters: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


def top1_loss(
    probs_TE: Tensor, ids_TK: Tensor, mask_T: Tensor | None = None, group: ProcessGroup | None = None
) -> Tensor:
    """``E sum_e fhat_e^2 / mean_t(sum_k p_t,k)`` with ``fhat = mean_t p`` (Sigma-MoE-Tiny, arXiv 2512.16248).

    Where the Switch loss is at its minimum when *either* load or probabilities are uniform, this one is 1
    only with one-hot probabilities and uniform load: the divisor punishes flat ones. It is differentiable
    throughout.

    Args:
        probs_TE: ``[T, E]`` probabilities, softmax of the logits over a temperature; they carry the gradient.
        ids_TK: ``[T, K]`` chosen experts.
        mask_T: ``[T]`` bool, True for real tokens.
        group: The ranks whose tokens are counted together. The average over ranks of the gradient is that of
            the loss of all tokens.

    Returns:
        A scalar, without coefficient; 0 where there is no token.
    """
    E = probs_TE.shape[1]
    chosen_T = probs_TE.gather(-1, ids_TK).sum(-1)
    if mask_T is not None:
        probs_TE, chosen_T = probs_TE * mask_T[:, None], chosen_T * mask_T
    local = torch.cat([probs_TE.sum(0), chosen_T.sum()[None]])
    with torch.no_grad():
        tokens = mask_T.sum() if mask_T is not None else torch.full((), len(probs_TE), device=local.device)
        every = torch.cat([local.detach(), tokens[None].to(local)])
        ranks = 1
        if group is not None:
            ranks = group.size()
            torch.distributed.all_reduce(every, group=group)
        every, tokens_per_rank = every[:-1] / ranks, (every[-1] / ranks).clamp_min(1)
    # The value is that of all ranks; the gradient is this rank's share times the number of ranks.
    means = (local + (every - local.detach())) / tokens_per_rank
    return E * means[:-1].square().sum() / means[-1].clamp_min(torch.finfo(means.dtype).tiny)
