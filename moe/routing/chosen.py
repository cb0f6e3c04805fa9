"""From which pairs of token and expert are chosen, as a mask ``[T, E]``, to slots and to load.

Letters: T tokens, E experts, K slots a token, B sequences, S tokens a sequence.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from moe.routing.balance import Load
from moe.types import LayerContext


def sequence_shape(num_tokens: int, ctx: LayerContext) -> tuple[int, int]:
    """B and S of T tokens; one sequence where the batch is not known."""
    B = ctx.num_sequences(num_tokens)
    return B, num_tokens // B


def slots_of_mask(chosen_TE: Tensor, weights_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Expert ids, weights and mask ``[T, K]`` of the chosen pairs; K is the most that any token has.

    The host waits for the device once, to know K; planning masked slots waits as well.
    """
    slots = max(int(chosen_TE.sum(-1).max()), 1) if len(chosen_TE) else 1
    # Stable: a token's experts in ascending order, the chosen ones first.
    order_TE = chosen_TE.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    ids_TK = order_TE[:, :slots]
    return ids_TK, weights_TE.gather(-1, ids_TK), chosen_TE.gather(-1, ids_TK)


@torch.no_grad()
def chosen_load(chosen_TE: Tensor, ctx: LayerContext) -> Load:
    """How many real tokens chose each expert, over the ranks of the run's group."""
    T, E = chosen_TE.shape
    mask_T = ctx.token_mask_T(T)
    real_TE = chosen_TE if mask_T is None else chosen_TE & mask_T[:, None]
    packed = torch.empty(E + 1, device=chosen_TE.device)
    packed[:E] = real_TE.sum(0)
    # Not assigned: for a number that is assigned to an element the host waits.
    packed[E].fill_(T) if mask_T is None else packed[E].copy_(mask_T.sum())
    ranks = 1
    if ctx.run.group is not None:
        ranks = ctx.run.group.size()
        torch.distributed.all_reduce(packed, group=ctx.run.group)
    return Load(packed[:E], packed[:E].sum(), packed[E] / ranks)


def top_of_sequences(scores_BSE: Tensor, real_BS: Tensor | None, share: Fraction) -> Tensor:
    """``[B, S, E]`` bool: in each sequence and column, the ``ceil(share * S)`` real tokens of highest score.

    Args:
        scores_BSE: ``[B, S, E]``.
        real_BS: ``[B, S]`` bool, True for real tokens, which alone are counted and chosen; None: all are.
        share: Of the real tokens, in (0, 1]. A fraction, since ``0.1 * 30`` rounded up may be 4.
    """
    _, S, E = scores_BSE.shape
    # Rounded up in whole numbers: torch.compile does not follow fractions.
    budget = -(-share.numerator * S // share.denominator)
    chosen_BSE = torch.zeros_like(scores_BSE, dtype=torch.bool)
    if real_BS is None:
        return chosen_BSE.scatter_(1, scores_BSE.topk(budget, dim=1).indices, True)
    ids_BCE = scores_BSE.masked_fill(~real_BS[:, :, None], -torch.inf).topk(budget, dim=1).indices
    wanted_B = (real_BS.sum(1) * share.numerator + share.denominator - 1) // share.denominator
    within_BC = torch.arange(budget, device=scores_BSE.device) < wanted_B[:, None]
    return chosen_BSE.scatter_(1, ids_BCE, within_BC[:, :, None].expand(-1, -1, E).contiguous())


def shares_of_chosen(logits_TE: Tensor, chosen_TE: Tensor) -> Tensor:
    """``[T, E]`` softmax over the chosen experts of each token alone; of no meaning where none is chosen."""
    return logits_TE.masked_fill(~chosen_TE, torch.finfo(logits_TE.dtype).min).softmax(-1)


def coverage_metrics(chosen_TE: Tensor, ctx: LayerContext) -> dict[str, Tensor]:
    """Of this rank's real tokens: mean and largest number of experts, and the share that has none."""
    used_T = chosen_TE.sum(-1).float()
    mask_T = ctx.token_mask_T(len(used_T))
    bare_T = used_T == 0
    count: Tensor | int = max(len(used_T), 1)
    if mask_T is not None:
        # Filled, not picked: how many are real only the device knows.
        used_T, bare_T = used_T.masked_fill(~mask_T, 0), bare_T & mask_T
        count = mask_T.sum().clamp_min(1)
    return {
        "experts_per_token": used_T.sum() / count,
        "most_experts": used_T.max() if len(used_T) else used_T.sum(),
        "uncovered": bare_T.sum() / count,
    }
