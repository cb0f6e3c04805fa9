"""Likeness of a layer's experts, by what they compute and by their weights, each a pure function.

Letters: N tokens, D width, E experts, F neurons of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe.experts.experts import Experts


def mean_cosine(means_ED: Tensor) -> Tensor:
    """Computes ``[E, E]`` cosines of the experts' mean outputs (HC-SMoE's feature, arXiv 2410.08589)."""
    unit_ED = torch.nn.functional.normalize(means_ED.double(), dim=-1)
    return unit_ED @ unit_ED.T


def centred_gram(x_ND: Tensor) -> Tensor:
    """Computes inner products ``[N, N]`` of outputs, centred over tokens, with a diagonal of 0.

    Without the diagonal `linear_cka` has no bias: with it, outputs of fewer tokens than widths are alike
    whatever they are.
    """
    x_ND = x_ND.double() - x_ND.double().mean(0)
    return (x_ND @ x_ND.T).fill_diagonal_(0)


def linear_cka(grams_ENN: Tensor) -> Tensor:
    """Computes ``[E, E]`` linear CKA of all pairs: HSIC of a pair over the root of both with themselves.

    HSIC is the estimate without bias of Song et al. 2012 (Eq. 5; Nguyen et al., arXiv 2010.15327), so that
    unrelated outputs have 0 whatever their width, and somewhat less by chance. 1: the same outputs up to a
    rotation and a factor. NaN for an expert whose output is the same for all tokens.

    Args:
        grams_ENN: `centred_gram` of each expert on the same N tokens, 4 at least.
    """
    N = grams_ENN.shape[-1]
    rows_EN = grams_ENN.sum(-1)
    total_E = rows_EN.sum(-1)
    flat_EN = grams_ENN.flatten(1)
    hsic_EE = flat_EN @ flat_EN.T + total_E[:, None] * total_E / ((N - 1) * (N - 2))
    hsic_EE = hsic_EE - 2 / (N - 2) * rows_EN @ rows_EN.T
    own_E = hsic_EE.diagonal().clamp_min(0).sqrt()
    return hsic_EE / (own_E[:, None] * own_E)


def neurons(experts: Experts, expert: int) -> Tensor:
    """Returns ``[F, ...]`` the weights of each neuron: its rows of gate and up, and its column of down."""
    up_UD, down_DF = experts.w_up_EUD[expert], experts.w_down_EDF[expert]
    return torch.cat([*up_UD.split(down_DF.shape[1]), down_DF.T], dim=1).detach()


def alignment(a_FN: Tensor, b_FN: Tensor) -> Tensor:
    """Returns for each neuron of one expert the neuron of another that it is matched with, ``[F]``.

    Matches have the largest sum of inner products (linear assignment). For copies it is the identity.
    """
    from scipy.optimize import linear_sum_assignment

    _, columns = linear_sum_assignment((a_FN @ b_FN.T).numpy(), maximize=True)
    return torch.from_numpy(columns)


def aligned_cosine(a_FN: Tensor, b_FN: Tensor) -> tuple[float, float]:
    """Computes the cosine of two experts' weights with neurons aligned, and the share of those that stay."""
    matched_F = alignment(a_FN, b_FN)
    cosine = torch.nn.functional.cosine_similarity(a_FN.flatten(), b_FN[matched_F].flatten(), dim=0)
    return float(cosine), float((matched_F == torch.arange(len(matched_F))).double().mean())


def weight_cosine(experts: Experts) -> Tensor:
    """Computes ``[E, E]`` cosines of the experts' flattened weights, neurons as they stand."""
    gram_EE = torch.zeros((experts.shape[0],) * 2, dtype=torch.float64)
    for w_E in (experts.w_up_EUD.detach().flatten(1), experts.w_down_EDF.detach().flatten(1)):
        gram_EE += (w_E @ w_E.T).double()
    norm_E = gram_EE.diagonal().sqrt()
    return gram_EE / (norm_E[:, None] * norm_E)


def distances(experts: Experts, dense: Sequence[Tensor] | None = None) -> Tensor:
    """Computes ``[E]`` distances of the experts' weights from a base, over the base's norm.

    Args:
        experts: The experts.
        dense: Up matrix, gate rows first, and down matrix of the base; None for the mean of the experts
            (the view of DeRS, arXiv 2503.01359: experts are a base and small differences).
    """
    weights = (experts.w_up_EUD.detach(), experts.w_down_EDF.detach())
    bases = [w_E.mean(0) for w_E in weights] if dense is None else dense
    square_E = torch.zeros(experts.shape[0], dtype=torch.float64)
    for expert in range(experts.shape[0]):
        for w_E, base in zip(weights, bases, strict=True):
            square_E[expert] += (w_E[expert] - base).double().square().sum()
    return (square_E / sum(base.double().square().sum() for base in bases)).sqrt()
