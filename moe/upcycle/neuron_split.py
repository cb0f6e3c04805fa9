"""Assignment of a dense network's neurons to experts.

Letters: E experts, F width of the dense network, M neurons of an expert, S neurons of the shared expert or
sampled tokens, N candidates.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from moe.upcycle.clustering import assign_balanced, balanced_kmeans

# Neurons up to which the spectrum is computed in full.
_FULL_SPECTRUM = 2048
_MAX_SWEEPS = 20
# Neurons of a group that are considered for an exchange.
_CANDIDATES = 32


def groups_of(label_F: Tensor, num_experts: int) -> Tensor:
    """Returns the ``[E, M]`` int64 neurons of each expert, ascending, for labels of equally large groups."""
    sizes_E = torch.bincount(label_F, minlength=num_experts)
    assert len(set(sizes_E.tolist())) == 1, f"groups of sizes {sizes_E.tolist()}"
    return label_F.argsort(stable=True).view(num_experts, -1)


def random_groups(width: int, num_experts: int, generator: Generator) -> Tensor:
    """Returns ``[E, M]``: a random partition."""
    order_F = torch.randperm(width, generator=generator)
    return order_F.view(num_experts, -1).sort(dim=1).values


def snake_groups(score_F: Tensor, num_experts: int) -> Tensor:
    """Returns ``[E, M]``: neurons dealt out by falling score, back and forth, so that sums are close.

    Source: arXiv 2512.02351 (rows of E, every other one reversed; column e is expert e). Ids refer to
    `score_F`.
    """
    rows_ME = score_F.argsort(descending=True, stable=True).view(-1, num_experts).clone()
    rows_ME[1::2] = rows_ME[1::2].flip(1)
    return rows_ME.t().sort(dim=1).values


def greedy_groups(score_EF: Tensor) -> Tensor:
    """Returns ``[E, M]``: repeatedly the highest score whose neuron is free and whose expert has room.

    This is LLaMA-MoE's gradient split without sharing; ties go to the lower expert, then the lower neuron.
    """
    E, F = score_EF.shape
    assert F % E == 0, (F, E)
    order = score_EF.flatten().argsort(descending=True, stable=True)
    label = [-1] * F
    room = [F // E] * E
    for place in order.tolist():
        expert, neuron = divmod(place, F)
        if label[neuron] < 0 and room[expert]:
            label[neuron] = expert
            room[expert] -= 1
    return groups_of(torch.tensor(label), E)


def top_groups(score_EF: Tensor, width: int) -> Tensor:
    """Returns ``[E, M]``: each expert's own highest scores; neurons may be in several experts, or in none."""
    return score_EF.argsort(dim=1, descending=True, stable=True)[:, :width].sort(dim=1).values


def most_wanted(score_EF: Tensor, width: int, count: int) -> Tensor:
    """Returns the ``[S]`` neurons, ascending, that are in turn among the highest `width` of the most experts.

    As in LLaMA-MoE's release (v1 and v2): all neurons of the highest count are taken (the lower ones, where
    there is no room for all), the experts' lists are filled up with those that come next, and counted again.
    """
    F = score_EF.shape[1]
    order_EF = score_EF.argsort(dim=1, descending=True, stable=True)
    free_F = torch.ones(F, dtype=torch.bool, device=score_EF.device)
    while (room := count - int((~free_F).sum())) > 0:
        free_EF = free_F[order_EF]
        listed_EF = free_EF & (free_EF.cumsum(1) <= width)
        wanted_F = torch.bincount(order_EF[listed_EF], minlength=F)
        free_F[(wanted_F == wanted_F.max()).nonzero()[:room, 0]] = False
    return (~free_F).nonzero().squeeze(1)


def coactivation_groups(weight_FF: Tensor, num_experts: int, generator: Generator) -> Tensor:
    """Returns ``[E, M]``: a balanced partition of a graph that keeps heavy edges within groups.

    It starts from a spectral partition (balanced k-means of the eigenvectors of the normalised adjacency) and
    applies Kernighan-Lin exchanges of pairs until none lowers the cut. The papers use METIS instead.

    Args:
        weight_FF: ``[F, F]`` symmetric weights, at least 0; the diagonal is ignored.
        num_experts: E, a divisor of F.
        generator: Draws the starts.
    """
    weight_FF = weight_FF.detach().float().cpu().clone().fill_diagonal_(0)
    vectors_FE = _spectrum(weight_FF, num_experts, generator)
    label_F = balanced_kmeans(vectors_FE, num_experts, generator).labels_N
    return groups_of(_refined(weight_FF, label_F, num_experts), num_experts)


def _spectrum(weight_FF: Tensor, count: int, generator: Generator) -> Tensor:
    F = len(weight_FF)
    in_full = len(weight_FF) <= max(_FULL_SPECTRUM, 3 * count)
    weight_FF = weight_FF.double() if in_full else weight_FF
    degree_F = weight_FF.sum(1)
    scale_F = torch.where(degree_F > 0, degree_F.clamp_min(1e-30).rsqrt(), 0.0)
    normalised_FF = scale_F[:, None] * weight_FF * scale_F
    if in_full:
        vectors_FE = torch.linalg.eigh(normalised_FF).eigenvectors[:, -count:]
    else:
        start_FE = torch.randn(F, count, generator=generator)
        _, vectors_FE = torch.lobpcg(normalised_FF, X=start_FE, largest=True)
    rows_FE: Tensor = torch.nn.functional.normalize(vectors_FE, dim=1)
    return rows_FE


def _refined(weight_FF: Tensor, label_F: Tensor, num_experts: int) -> Tensor:
    """Exchanges neurons of pairs of groups while an exchange lowers the cut."""
    label_F = label_F.clone()
    member_FE = torch.nn.functional.one_hot(label_F, num_experts)
    # In fp64, so that many updates do not change the sums of fp32 weights.
    inside_FE = (weight_FF @ member_FE.float()).double()
    slack = 1e-6 * float(weight_FF.max().clamp_min(1e-30))
    for _ in range(_MAX_SWEEPS):
        moved = False
        for a in range(num_experts):
            for b in range(a + 1, num_experts):
                while _exchange_best(weight_FF, inside_FE, label_F, (a, b), slack):
                    moved = True
        if not moved:
            break
    return label_F


def _exchange_best(
    weight_FF: Tensor, inside_FE: Tensor, label_F: Tensor, pair: tuple[int, int], slack: float
) -> bool:
    """Exchanges the two neurons that gain most together, among those that gain most alone."""
    a, b = pair
    gain_a_N, in_a_N = _keenest(inside_FE, label_F, a, b)
    gain_b_N, in_b_N = _keenest(inside_FE, label_F, b, a)
    gain_NN = gain_a_N[:, None] + gain_b_N - 2 * weight_FF[in_a_N[:, None], in_b_N]
    best = int(gain_NN.argmax())
    if not float(gain_NN.flatten()[best]) > slack:
        return False
    i, j = in_a_N[best // len(in_b_N)], in_b_N[best % len(in_b_N)]
    change_F = weight_FF[:, i].double() - weight_FF[:, j]
    inside_FE[:, b] += change_F
    inside_FE[:, a] -= change_F
    label_F[i], label_F[j] = b, a
    return True


def _keenest(inside_FE: Tensor, label_F: Tensor, own: int, other: int) -> tuple[Tensor, Tensor]:
    """Returns the largest gains of a group's neurons by moving to another group, and these neurons."""
    in_own_M = (label_F == own).nonzero().squeeze(1)
    gain_M = inside_FE[in_own_M, other] - inside_FE[in_own_M, own]
    top = gain_M.topk(min(_CANDIDATES, len(gain_M)))
    return top.values, in_own_M[top.indices]


def marker_groups(mark_SF: Tensor, rate_F: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Groups neurons that are marked by the same tokens, with a representative neuron for each (CMoE).

    Centroids are the marks of the E neurons with the highest rate; one balanced assignment by L1 distance
    follows (arXiv 2502.04416, with its ``max_iters`` of 1). The representative is nearest to its group's mean
    marks.

    Args:
        mark_SF: ``[S, F]`` of 0 and 1: marks of the neurons to be grouped, by token.
        rate_F: ``[F]`` rate at which each is marked in the whole text.
        num_experts: E, a divisor of F.

    Returns:
        ``[E, M]`` positions in 0 .. F - 1, and ``[E]`` the representatives.
    """
    mark_SF = mark_SF.float()
    centre_E = rate_F.argsort(descending=True, stable=True)[:num_experts]
    count_F = mark_SF.sum(0)
    # For columns of 0 and 1, |a - b| sums to a + b - 2 a b.
    cost_FE = count_F[:, None] + count_F[centre_E] - 2 * (mark_SF.t() @ mark_SF[:, centre_E])
    groups_EM = groups_of(assign_balanced(cost_FE), num_experts)
    members = []
    for group_M in groups_EM:
        marks_SM = mark_SF[:, group_M]
        distance_M = (marks_SM - marks_SM.mean(1, keepdim=True)).abs().sum(0)
        members.append(group_M[distance_M.argmin()])
    return groups_EM, torch.stack(members)
