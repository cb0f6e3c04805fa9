"""Figures of one layer's routing, each a pure function of sums over tokens.

Letters: T tokens, E experts, K experts a token, U different token ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.routers.base import Router
from moe.types import Routing

#: Mantissa bits of bf16: rounding moves a number between 2^e and 2^(e+1) by up to 2^(e-8).
_BF16_BITS = 8


def chosen_mask(routing: Routing) -> Tensor:
    """Returns ``[T, E]`` bool: the experts that each token uses."""
    ids_TK = routing.expert_ids_TK
    used_TK = torch.ones_like(ids_TK, dtype=torch.bool)
    if routing.slot_mask_TK is not None:
        used_TK = routing.slot_mask_TK
    hits_TE = torch.zeros(len(ids_TK), routing.num_experts, dtype=torch.int32)
    return hits_TE.scatter_add_(1, ids_TK.clamp(0, routing.num_experts - 1), used_TK.int()) > 0


def co_activation_lift(together_EE: Tensor, tokens: int) -> Tensor:
    """Computes how much more often two experts share a token than independent ones would.

    ``T N_ij / (N_i N_j)``: 1 for independence, NaN where one of them has no token. K experts that are drawn
    without favour have ``E (K - 1) / (K (E - 1))``, below 1.

    Args:
        together_EE: Tokens that use both; the diagonal has each expert's own.
        tokens: T.
    """
    counts_E = together_EE.diagonal().double()
    return tokens * together_EE.double() / (counts_E[:, None] * counts_E[None])


def conditional_share(together_EE: Tensor) -> Tensor:
    """Computes ``P(j|i) = N_ij / N_i``: of the tokens that use i, the share that uses j; NaN without any."""
    return together_EE.double() / together_EE.diagonal().double()[:, None]


def bf16_move(values: Tensor) -> Tensor:
    """Returns the most that rounding to bf16 moves each number: half the distance of its neighbours."""
    _, exponent = torch.frexp(values.double())
    return torch.ldexp(torch.ones_like(values, dtype=torch.double), exponent - 1 - _BF16_BITS)


def choice_scores(router: Router[object], routing: Routing) -> tuple[Tensor, Tensor] | None:
    """Returns ``[T, E]`` what the router compares experts by, and how far bf16 rounding moves it.

    That is the logits, which are rounded; or of a router with a selection bias the scores plus the bias, to
    first order. None for a router that has no logits, or takes other numbers of experts a token.
    """
    logits_TE, scores_TE = routing.logits_TE, routing.scores_TE
    if logits_TE is None or routing.slot_mask_TK is not None:
        return None
    bias_E = getattr(router, "bias_E", None)
    move_TE = bf16_move(logits_TE)
    if bias_E is None or scores_TE is None:
        return logits_TE.double(), move_TE
    # The slope of softmax and of the sigmoid alike.
    slope_TE = (scores_TE * (1 - scores_TE)).double()
    return scores_TE.double() + bias_E.double(), slope_TE * move_TE


def margins(choice_TE: Tensor, move_TE: Tensor, chosen_TE: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Computes the margin of the last chosen over the first left-out expert, and whether it is a near tie.

    Of a router that chooses among groups, experts of groups without a chosen one are no candidates.

    Args:
        choice_TE: What experts are compared by.
        move_TE: How far rounding moves it.
        chosen_TE: True for the chosen.
        groups: Number of groups.

    Returns:
        ``[T]`` margins, infinite where no expert is left out; ``[T]`` bool, True where rounding of both can
        exceed the margin.
    """
    T, E = choice_TE.shape
    open_TE = chosen_TE.view(T, groups, E // groups).any(-1, keepdim=True).expand(T, groups, E // groups)
    left_TE = open_TE.reshape(T, E) & ~chosen_TE
    last_T = choice_TE.masked_fill(~chosen_TE, torch.inf).min(-1)
    first_T = choice_TE.masked_fill(~left_TE, -torch.inf).max(-1)
    margin_T = last_T.values - first_T.values
    moves_T = move_TE.gather(1, last_T.indices[:, None]) + move_TE.gather(1, first_T.indices[:, None])
    return margin_T, margin_T < moves_T[:, 0]


def vocabulary_share(by_token_UE: Tensor, seen_U: Tensor) -> Tensor:
    """Computes of each token id's occurrences the share that uses each expert, ``[U, E]``."""
    return by_token_UE.double() / seen_U.double()[:, None].clamp_min(1)


def vocabulary_specialisation(by_token_UE: Tensor, seen_U: Tensor, least: int) -> tuple[float, float]:
    """Computes the mean over token ids of the share of their favourite expert, and the coverage.

    Args:
        by_token_UE: Occurrences of each id that use each expert.
        seen_U: Occurrences of each id.
        least: Ids with fewer occurrences are left out: a single one has a share of 1.

    Returns:
        The mean, NaN where no id is left; the share of the text's tokens whose ids are counted.
    """
    counted_U = seen_U >= least
    share_UE = vocabulary_share(by_token_UE, seen_U)[counted_U]
    mean = float(share_UE.max(-1).values.mean()) if len(share_UE) else float("nan")
    return mean, float(seen_U[counted_U].sum() / seen_U.sum().clamp_min(1))


def favourite_tokens(by_token_UE: Tensor, seen_U: Tensor, expert: int, least: int, most: int) -> list[int]:
    """Returns the places of the ids that an expert takes most above its own share, the most first.

    Ids with fewer than ``least`` occurrences, or at or below the share that the expert has of all tokens, are
    left out. Of equal shares, the id with more occurrences is first.
    """
    share_U = vocabulary_share(by_token_UE, seen_U)[:, expert]
    fair = float(by_token_UE[:, expert].sum() / seen_U.sum().clamp_min(1))
    places = [u for u in range(len(seen_U)) if seen_U[u] >= least and share_U[u] > fair]
    return sorted(places, key=lambda u: (-float(share_U[u]), -int(seen_U[u])))[:most]
