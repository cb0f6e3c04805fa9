"""Balance losses as pure functions with explicit divisors, token means, and the op that attaches losses.

Counts are taken over all ranks that share a micro-batch, so that N ranks equal 1 rank. Mean probabilities
stay local, divided by the tokens *per rank*, so that the average of gradients over ranks is the gradient of
the global loss.

Letters: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moe.routing.scope import BalanceScope
from moe.routing.step_state import StepSums
from moe.types import LayerContext


@dataclass(frozen=True)
class Load:
    """Number of slots that each expert got, over all ranks of a group.

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
    """Counts the slots of real tokens over the ranks of a group (this rank alone if None).

    Args:
        ids_TK: ``[T, K]`` int64 chosen experts.
        num_experts: E.
        mask_T: ``[T]`` bool, True for real tokens; None if all are.
        group: The ranks that share the micro-batch.
    """
    T, K = ids_TK.shape
    ones_TK = torch.ones(T, K, device=ids_TK.device)
    if mask_T is not None:
        ones_TK *= mask_T[:, None]
    # The last element carries the token count, so that one all-reduce suffices.
    packed = torch.zeros(num_experts + 1, device=ids_TK.device)
    packed.scatter_add_(0, ids_TK.reshape(-1), ones_TK.reshape(-1))
    # Filled, not assigned: assigning a number to an element makes the host wait.
    packed[-1].fill_(T) if mask_T is None else packed[-1].copy_(mask_T.sum())
    ranks = 1
    if group is not None:
        ranks = group.size()
        torch.distributed.all_reduce(packed, group=group)
    counts_E = packed[:-1]
    return Load(counts_E, counts_E.sum(), packed[-1] / ranks)


def switch_loss(load: Load, probs_TE: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Computes ``E * sum_e f_e P_e`` (Switch Transformers, arXiv 2101.03961, Eq. 4): 1 if perfectly balanced.

    Args:
        load: Slots of each expert; f is each expert's share and sums to 1 for any K.
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
    """Computes the mean squared logsumexp of the router logits (ST-MoE, arXiv 2202.08906, Eq. 5).

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
    """Autograd function that returns the activation; backward adds ``scale`` times the loss's gradient."""

    @staticmethod
    def forward(ctx: Any, activation: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.like = scale, (loss.dtype, loss.device)
        return activation.view_as(activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        dtype, device = ctx.like
        return grad, torch.full((), ctx.scale, dtype=dtype, device=device), None


def attach_loss(activation: Tensor, loss: Tensor, scale: float) -> Tensor:
    """Returns the activation; differentiating it also differentiates the loss, with weight `scale`.

    Any model trains with balance losses this way, without a change of its forward signature.

    Args:
        activation: Any tensor on the path to the main loss.
        loss: A scalar.
        scale: Factor on the micro-batch's main loss before backward.
    """
    out: Tensor = _AttachLoss.apply(activation, loss, scale)  # type: ignore[no-untyped-call]
    return out


def balance_loss(
    scope: BalanceScope, probs_TE: Tensor, ids_TK: Tensor, ctx: LayerContext, history: StepSums
) -> Tensor:
    """Computes the Switch loss with load counted over the tokens of a scope; 1 if perfectly balanced.

    Args:
        scope: ``micro_batch``: the micro-batch of all ranks. ``global_batch``: the micro-batches of the step
            up to this one, of all ranks (arXiv 2501.11873; P stays the micro-batch's). ``sequence``: each
            sequence by itself, then the mean over sequences (DeepSeek-V3, arXiv 2412.19437, Eq. 17-20).
        probs_TE: ``[T, E]`` probabilities that sum to 1 over E; they carry the gradient.
        ids_TK: ``[T, K]`` chosen experts.
        ctx: Padding, ranks, and the shape of the batch.
        history: The layer's sums over the step, for ``global_batch``.
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


def top1_loss(
    probs_TE: Tensor, ids_TK: Tensor, mask_T: Tensor | None = None, group: ProcessGroup | None = None
) -> Tensor:
    """Computes ``E sum_e fhat_e^2 / mean_t(sum_k p_t,k)``, ``fhat = mean_t p`` (Sigma-MoE-Tiny).

    Source: arXiv 2512.16248. The Switch loss is minimal if *either* load or probabilities are uniform; this
    loss is 1 only for one-hot probabilities and uniform load, as the divisor penalises flat probabilities. It
    is differentiable everywhere.

    Args:
        probs_TE: ``[T, E]`` probabilities, softmax of the logits over a temperature; they carry the gradient.
        ids_TK: ``[T, K]`` chosen experts.
        mask_T: ``[T]`` bool, True for real tokens.
        group: The ranks whose tokens are counted together. The gradient averaged over ranks is that of the
            loss over all tokens.

    Returns:
        A scalar, without coefficient; 0 without tokens.
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
    # The value covers all ranks; the gradient is this rank's share times the number of ranks.
    means = (local + (every - local.detach())) / tokens_per_rank
    return E * means[:-1].square().sum() / means[-1].clamp_min(torch.finfo(means.dtype).tiny)


def soft_balance_loss(gates_TE: Tensor, ctx: LayerContext) -> Tensor:
    """Computes the Switch loss (arXiv 2101.03961, Eq. 4) with f measured in combine weight, not tokens.

    It is for gates that are dense or vary in number. f is an expert's share of all combine weight, over the
    real tokens of all ranks, without gradient; P is its mean over this rank's tokens. The loss is 1 if
    balanced, and E if one expert gets everything.

    Args:
        gates_TE: ``[T, E]`` weights that sum to at most 1; they carry the gradient.
        ctx: Padding and ranks.
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
        # Passed as shares: switch_loss divides by at least 1, and the mass of few tokens may be less.
        shares_E = packed[:-1] / mass.clamp_min(torch.finfo(mass.dtype).tiny)
        load = Load(shares_E, mass.new_ones(()), packed[-1] / ranks)
    return switch_loss(load, gates_TE, mask_T)


def loss_mean(values_T: Tensor, ctx: LayerContext) -> Tensor:
    """Returns the sum over real tokens divided by the real tokens *per rank*, for losses.

    The gradient averaged over ranks is then that of the mean over all tokens, however many each rank has.
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
    """Returns the mean over this rank's real tokens, for figures; 0 without tokens."""
    mask_T = ctx.token_mask_T(len(values_T))
    count = max(len(values_T), 1) if mask_T is None else mask_T.sum().clamp_min(1)
    return _real(values_T, mask_T).sum() / count


def _real(values_T: Tensor, mask_T: Tensor | None) -> Tensor:
    # Filled, not multiplied: values of padding may not be finite.
    return values_T if mask_T is None else values_T.masked_fill(~mask_T, 0)
