"""Thresholds between the chosen and the rest, and quantile balancing: biases that even out counts.

Sources: Su, "MoE Odyssey" on quantile balancing (kexue.fm 11619 fixed, 11626 dynamic), known to us from
notes. Megatron-LM's code takes the best token left out as the threshold; here it is halfway to that one.

Letters: T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def top_thresholds(scores_TE: Tensor, counts: Tensor, most: int, mask_T: Tensor | None = None) -> Tensor:
    """Returns ``[E]`` values that ``counts`` of each column's real tokens exceed, halfway to the next token.

    Args:
        scores_TE: ``[T, E]``.
        counts: Integer scalar: the number of tokens above the value. Below 1 it counts as 1, so that no
            column is shut; if it is all real tokens, the value is 1 below the smallest.
        most: Upper bound on `counts`, known to the host.
        mask_T: ``[T]`` bool, True for real tokens.
    """
    T, E = scores_TE.shape
    if T == 0:
        return scores_TE.new_zeros(E)
    if mask_T is not None:
        scores_TE = scores_TE.masked_fill(~mask_T[:, None], -torch.inf)
    top_NE = scores_TE.topk(min(most + 1, T), dim=0).values
    last = (counts.clamp_min(1) - 1).clamp_max(len(top_NE) - 1)
    # Indexing by top_NE[last] would make the host wait.
    inside_E = top_NE.index_select(0, last.view(1))[0]
    outside_E = top_NE.index_select(0, (last + 1).clamp_max(len(top_NE) - 1).view(1))[0]
    none_left_E = ~outside_E.isfinite() | (last + 1 >= len(top_NE))
    # Halves are added, as the sum of two huge numbers may be infinite.
    middle_E = torch.where(none_left_E, inside_E - 1, inside_E / 2 + outside_E / 2)
    return torch.where(inside_E.isfinite(), middle_E, 0)


def quantile_thresholds(scores_TE: Tensor, top_k: int, mask_T: Tensor | None = None) -> Tensor:
    """Returns the ``[E]`` (1 - K/E) quantiles of the columns: about ``K T / E`` real tokens exceed each."""
    T, E = scores_TE.shape
    real = torch.full((), T, device=scores_TE.device) if mask_T is None else mask_T.sum()
    # Rounded to the nearest integer, ties up.
    counts = (2 * top_k * real + E) // (2 * E)
    return top_thresholds(scores_TE, counts, (2 * top_k * T + E) // (2 * E), mask_T)


@torch.no_grad()
def quantile_biases(
    scores_TE: Tensor, top_k: int, iterations: int, bias_E: Tensor, mask_T: Tensor | None = None
) -> Tensor:
    """Returns ``[E]`` biases of mean 0 that even out top-K counts when subtracted from the scores.

    In an iteration, alpha_t is the (K+1)-th largest of row ``s - beta``, then beta_e the (1 - K/E) quantile
    of column ``s - alpha``: coordinate descent on the dual of the balanced assignment problem.

    Args:
        scores_TE: ``[T, E]``.
        top_k: K < E; if all experts are chosen, there is nothing to balance and the biases stay.
        iterations: Number of iterations.
        bias_E: Initial biases.
        mask_T: ``[T]`` bool, True for real tokens.
    """
    if top_k >= scores_TE.shape[1] or not len(scores_TE):
        return bias_E
    for _ in range(iterations):
        alpha_T = (scores_TE - bias_E).topk(top_k + 1, dim=-1).values[:, -1]
        bias_E = quantile_thresholds(scores_TE - alpha_T[:, None], top_k, mask_T)
        bias_E = bias_E - bias_E.mean()
    return bias_E
