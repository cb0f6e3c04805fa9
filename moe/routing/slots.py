"""Slots of a `moe.types.Routing`, made from masks of chosen pairs or from dense gates with exact zeros.

Letters: T tokens, E experts, K slots a token, B sequences, S tokens a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor

from moe.routing.balance import Load, figure_mean
from moe.types import LayerContext, Routing


def sequence_shape(num_tokens: int, ctx: LayerContext) -> tuple[int, int]:
    """Returns B and S of T tokens; one sequence if the batch is unknown."""
    B = ctx.num_sequences(num_tokens)
    return B, num_tokens // B


def slots_of_mask(chosen_TE: Tensor, weights_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns expert ids, weights and mask ``[T, K]`` of the chosen pairs; K is the most that any token has.

    The host waits for the device once, to know K; planning masked slots waits as well.
    """
    slots = max(int(chosen_TE.sum(-1).max()), 1) if len(chosen_TE) else 1
    # Stable: a token's experts in ascending order, the chosen ones first.
    order_TE = chosen_TE.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    ids_TK = order_TE[:, :slots]
    return ids_TK, weights_TE.gather(-1, ids_TK), chosen_TE.gather(-1, ids_TK)


@torch.no_grad()
def chosen_load(chosen_TE: Tensor, ctx: LayerContext) -> Load:
    """Counts the real tokens that chose each expert, over the ranks of the run's group."""
    T, E = chosen_TE.shape
    mask_T = ctx.token_mask_T(T)
    real_TE = chosen_TE if mask_T is None else chosen_TE & mask_T[:, None]
    packed = torch.empty(E + 1, device=chosen_TE.device)
    packed[:E] = real_TE.sum(0)
    # Filled, not assigned: assigning a number to an element makes the host wait.
    packed[E].fill_(T) if mask_T is None else packed[E].copy_(mask_T.sum())
    ranks = 1
    if ctx.run.group is not None:
        ranks = ctx.run.group.size()
        torch.distributed.all_reduce(packed, group=ctx.run.group)
    return Load(packed[:E], packed[:E].sum(), packed[E] / ranks)


def top_of_sequences(scores_BSE: Tensor, real_BS: Tensor | None, share: Fraction) -> Tensor:
    """Returns ``[B, S, E]`` bool: per sequence and column, the ``ceil(share * S)`` best real tokens.

    Args:
        scores_BSE: ``[B, S, E]``.
        real_BS: ``[B, S]`` bool, True for real tokens, the only ones counted and chosen; None if all are.
        share: Share of the real tokens, in (0, 1]. A fraction, since ``0.1 * 30`` rounded up may be 4.
    """
    _, S, E = scores_BSE.shape
    # Rounded up with integers: torch.compile does not trace fractions.
    budget = -(-share.numerator * S // share.denominator)
    chosen_BSE = torch.zeros_like(scores_BSE, dtype=torch.bool)
    if real_BS is None:
        return chosen_BSE.scatter_(1, scores_BSE.topk(budget, dim=1).indices, True)
    ids_BCE = scores_BSE.masked_fill(~real_BS[:, :, None], -torch.inf).topk(budget, dim=1).indices
    wanted_B = (real_BS.sum(1) * share.numerator + share.denominator - 1) // share.denominator
    within_BC = torch.arange(budget, device=scores_BSE.device) < wanted_B[:, None]
    return chosen_BSE.scatter_(1, ids_BCE, within_BC[:, :, None].expand(-1, -1, E).contiguous())


def shares_of_chosen(logits_TE: Tensor, chosen_TE: Tensor) -> Tensor:
    """Returns the ``[T, E]`` softmax over each token's chosen experts; meaningless if none is chosen."""
    return logits_TE.masked_fill(~chosen_TE, torch.finfo(logits_TE.dtype).min).softmax(-1)


def coverage_metrics(chosen_TE: Tensor, ctx: LayerContext) -> dict[str, Tensor]:
    """Returns mean and largest number of experts of this rank's real tokens, and the share without any."""
    used_T = chosen_TE.sum(-1).float()
    mask_T = ctx.token_mask_T(len(used_T))
    bare_T = used_T == 0
    count: Tensor | int = max(len(used_T), 1)
    if mask_T is not None:
        # Filled, not indexed: only the device knows how many tokens are real.
        used_T, bare_T = used_T.masked_fill(~mask_T, 0), bare_T & mask_T
        count = mask_T.sum().clamp_min(1)
    return {
        "experts_per_token": used_T.sum() / count,
        "most_experts": used_T.max() if len(used_T) else used_T.sum(),
        "uncovered": bare_T.sum() / count,
    }


def slots_of_gates(gates_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns expert ids, weights and mask ``[T, K]`` of the gates that are not exactly 0.

    K is the largest number of experts that any token uses, not E: the plan sorts T*K slots and the
    combination iterates over them, so that with hard gates both cost the same as top-k routing. To know K the
    host waits for the device once; planning masked slots waits as well.

    A gate that is exactly 0 runs no expert, and passes on no gradient if it is a softmax or a product.
    """
    used_TE = gates_TE.detach() != 0
    slots = max(int(used_TE.sum(-1).max()), 1) if len(gates_TE) else 1
    ids_TK = gates_TE.detach().abs().topk(slots, dim=-1).indices
    return ids_TK, gates_TE.gather(-1, ids_TK), used_TE.gather(-1, ids_TK)


def gates_of_slots(routing: Routing) -> Tensor:
    """Returns ``[T, E]`` combine weights of used slots; 0 where a token does not use an expert."""
    ids_TK, weights_TK = routing.expert_ids_TK, routing.weights_TK
    if routing.slot_mask_TK is not None:
        ids_TK = ids_TK.masked_fill(~routing.slot_mask_TK, 0)
        weights_TK = weights_TK.masked_fill(~routing.slot_mask_TK, 0)
    gates_TE = torch.zeros(len(ids_TK), routing.num_experts, dtype=weights_TK.dtype, device=weights_TK.device)
    return gates_TE.scatter_add(1, ids_TK, weights_TK)


def hardening_routing(
    gates_TE: Tensor, hard_TAB: Tensor, figure: str, losses: Mapping[str, Tensor], ctx: LayerContext
) -> Routing:
    """Builds the routing of dense gates whose zeros become more as the parts of a router harden.

    Args:
        gates_TE: ``[T, E]`` combine weights.
        hard_TAB: ``[T, A, B]`` bool, True where a node or bit is exactly 0 or 1 for a token.
        figure: Name of the metric that holds the share of hard parts.
        losses: Losses of the router.
        ctx: Padding.
    """
    ids_TK, weights_TK, used_TK = slots_of_gates(gates_TE)
    hard_TAB = hard_TAB.to(weights_TK.dtype)
    # A router over one expert has no parts.
    hard_T = hard_TAB.mean((1, 2)) if hard_TAB[:1].numel() else hard_TAB.new_ones(len(hard_TAB))
    metrics = {
        figure: figure_mean(hard_T, ctx),
        "active_experts": figure_mean(used_TK.sum(-1).to(weights_TK.dtype), ctx),
    }
    E = gates_TE.shape[1]
    return Routing(ids_TK, weights_TK, E, used_TK, scores_TE=gates_TE, losses=losses, metrics=metrics)
