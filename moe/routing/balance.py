"""Balance losses as pure functions with explicit divisors, and the op that attaches their gradient.

Counts are taken over all ranks that share a micro-batch, so that N ranks equal 1 rank; the mean
probabilities stay local, divided by the tokens *per rank*, so that the average of gradients over ranks is
the gradient of the global loss.

Letters: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moe.routing.step_sums import StepSums
from moe.types import LayerContext


@dataclass(frozen=True)
class Load:
    """How many slots went to each expert, over all ranks of a group.

    Attributes:
        counts_E: ``[E]`` fp32.
        num_slots: fp32 scalar, their sum.
        tokens_per_rank: fp32 scalar, real tokens over all ranks divided by the number of ranks.
    """

    counts_E: Tensor
    num_slots: Tensor
    tokens_per_rank: Tensor


@torch.no_grad()
def count_load(
    ids_TK: Tensor, num_experts: int, mask_T: Tensor | None = None, group: ProcessGroup | None = None
) -> Load:
    """Counts the slots of real tokens over the ranks of a group (this rank alone when None).

    Args:
        ids_TK: ``[T, K]`` int64 chosen experts.
        num_experts: E.
        mask_T: ``[T]`` bool, True for real tokens; None when all are.
        group: The ranks that share the micro-batch.
    """
    T, K = ids_TK.shape
    ones_TK = torch.ones(T, K, device=ids_TK.device)
    if mask_T is not None:
        ones_TK *= mask_T[:, None]
    # The last element carries the token count, so that one all-reduce does.
    packed = torch.zeros(num_experts + 1, device=ids_TK.device)
    packed.scatter_add_(0, ids_TK.reshape(-1), ones_TK.reshape(-1))
    # Not assigned: for a number that is assigned to an element the host waits.
    packed[-1].fill_(T) if mask_T is None else packed[-1].copy_(mask_T.sum())
    ranks = 1
    if group is not None:
        ranks = group.size()
        torch.distributed.all_reduce(packed, group=group)
    counts_E = packed[:-1]
    return Load(counts_E, counts_E.sum(), packed[-1] / ranks)


def switch_loss(load: Load, probs_TE: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """``E * sum_e f_e P_e`` (Switch Transformers, arXiv 2101.03961, Eq. 4): 1 when perfectly balanced.

    Args:
        load: Where the slots went; f is its share of each expert and sums to 1 for any K.
        probs_TE: ``[T, E]`` router probabilities that sum to 1 over E; they carry the gradient.
        mask_T: ``[T]`` bool, True for real tokens.

    Returns:
        A scalar, without coefficient.
    """
    if mask_T is not None:
        probs_TE = probs_TE * mask_T[:, None]
    f_E = load.counts_E / load.num_slots.clamp_min(1)
    p_E = probs_TE.sum(0) / load.tokens_per_rank.clamp_min(1)
    return probs_TE.shape[1] * (f_E * p_E).sum()


def z_loss(logits_TE: Tensor, tokens_per_rank: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Mean of the squared logsumexp of the router logits (ST-MoE, arXiv 2202.08906, Eq. 5).

    Args:
        logits_TE: ``[T, E]`` fp32.
        tokens_per_rank: The divisor, from `count_load`.
        mask_T: ``[T]`` bool, True for real tokens.

    Returns:
        A scalar, without coefficient.
    """
    squares_T = logits_TE.logsumexp(-1).square()
    if mask_T is not None:
        squares_T = squares_T * mask_T
    return squares_T.sum() / tokens_per_rank.clamp_min(1)


class _AttachLoss(torch.autograd.Function):
    """Forward: the activation, unchanged. Backward: adds ``scale`` times the loss's gradient."""

    @staticmethod
    def forward(ctx: Any, activation: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.like = scale, (loss.dtype, loss.device)
        return activation.view_as(activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        dtype, device = ctx.like
        return grad, torch.full((), ctx.scale, dtype=dtype, device=device), None


def attach_loss(activation: Tensor, loss: Tensor, scale: float) -> Tensor:
    """Returns the activation; when it is differentiated, the loss is as well, with weight `scale`.

    Any host model trains with balance losses this way, without a change of its forward signature.

    Args:
        activation: Any tensor on the path to the main loss.
        loss: A scalar.
        scale: What the main loss of the micro-batch is multiplied by before backward.
    """
    out: Tensor = _AttachLoss.apply(activation, loss, scale)  # type: ignore[no-untyped-call]
    return out


BalanceScope = Literal["micro_batch", "sequence", "global_batch"]


def balance_loss(
    scope: BalanceScope, probs_TE: Tensor, ids_TK: Tensor, ctx: LayerContext, history: StepSums
) -> Tensor:
    """The Switch loss with load counted over the tokens of a scope; 1 when perfectly balanced.

    Args:
        scope: ``micro_batch``: the micro-batch of all ranks. ``global_batch``: the micro-batches of the step
            up to this one, of all ranks (arXiv 2501.11873; P stays that of the micro-batch).
            ``sequence``: each sequence by itself, then the mean over sequences (DeepSeek-V3, arXiv
            2412.19437, Eq. 17-20; summed over sequences of all ranks alike).
        probs_TE: ``[T, E]`` probabilities that sum to 1 over E; they carry the gradient.
        ids_TK: ``[T, K]`` chosen experts.
        ctx: Padding, ranks, and the shape of the batch.
        history: The layer's; used by ``global_batch``.
    """
    E = probs_TE.shape[1]
    mask_T = ctx.token_mask_T(len(ids_TK))
    if scope == "sequence":
        return _sequence_loss(probs_TE, ids_TK, mask_T, ctx.num_sequences(len(ids_TK)))
    load = count_load(ids_TK, E, mask_T, ctx.run.group)
    if scope == "global_batch":
        history.write(ctx.run, load.counts_E)
        counts_E = history.so_far(ctx.run)
        load = Load(counts_E, counts_E.sum(), load.tokens_per_rank)
    return switch_loss(load, probs_TE, mask_T)


def _sequence_loss(probs_TE: Tensor, ids_TK: Tensor, mask_T: Tensor | None, num_sequences: int) -> Tensor:
    E, K = probs_TE.shape[1], ids_TK.shape[1]
    real_T1 = probs_TE.new_ones(len(probs_TE), 1) if mask_T is None else mask_T[:, None].to(probs_TE.dtype)
    real_B1 = real_T1.view(num_sequences, -1).sum(1, keepdim=True).clamp_min(1)
    chosen_TE = torch.zeros_like(probs_TE).scatter_add_(1, ids_TK, real_T1.expand(-1, K).contiguous())
    f_BE = chosen_TE.view(num_sequences, -1, E).sum(1) / (K * real_B1)
    p_BE = (probs_TE * real_T1).view(num_sequences, -1, E).sum(1) / real_B1
    return E * (f_BE * p_BE).sum(1).mean()
