"""Clusters of equal size: balanced assignment for given costs, and k-means based on it.

The assignment is optimal (a linear assignment over places) up to a size; beyond it places are assigned
greedily and then exchanged until no exchange of two points lowers the cost.

Letters: N points, D their width, K clusters, P points of a cluster.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

#: Points up to which assignments are optimal. The work grows with the cube.
EXACT_POINTS = 512
# Enough for every pair of clusters to settle.
_MAX_SWEEPS = 50
# Within k-means, whose next round continues where this one stopped.
_KMEANS_SWEEPS = 4


@dataclass(frozen=True)
class Clusters:
    """Partition of points.

    Attributes:
        labels_N: ``[N]`` int64 cluster of each point.
        centroids_KD: ``[K, D]`` mean of each cluster's points.
        inertia: Sum of squared distances to the points' own centroids.
        rounds: Rounds of k-means.
    """

    labels_N: Tensor
    centroids_KD: Tensor
    inertia: float
    rounds: int


def equal_capacities(num_points: int, num_clusters: int) -> Tensor:
    """Returns ``[K]`` int64 sizes that differ by at most one, the larger first."""
    capacity_K = torch.full((num_clusters,), num_points // num_clusters, dtype=torch.int64)
    capacity_K[: num_points % num_clusters] += 1
    return capacity_K


def assign_balanced(
    cost_NK: Tensor,
    capacity_K: Tensor | None = None,
    exact_points: int = EXACT_POINTS,
    start_N: Tensor | None = None,
    max_sweeps: int = _MAX_SWEEPS,
) -> Tensor:
    """Returns the ``[N]`` int64 cluster of each point in a balanced assignment of low cost.

    Args:
        cost_NK: ``[N, K]`` finite cost of each point in each cluster.
        capacity_K: ``[K]`` int64 sizes with sum N; `equal_capacities` by default.
        exact_points: N up to which the cost is minimal.
        start_N: ``[N]`` balanced labels from which exchanges start, if some are likely close to the result.
        max_sweeps: Upper bound on rounds of exchanges between all pairs of clusters.
    """
    N, K = cost_NK.shape
    capacity_K = equal_capacities(N, K) if capacity_K is None else capacity_K.cpu()
    assert int(capacity_K.sum()) == N, (capacity_K, N)
    cost_NK = cost_NK.detach().double().cpu()
    if len(cost_NK) <= exact_points:
        # Imported where it is used: every start of a run imports this module, and scipy takes 0.3 seconds.
        from scipy.optimize import linear_sum_assignment

        place_cluster_N = torch.arange(K).repeat_interleave(capacity_K)
        _, column_N = linear_sum_assignment(cost_NK[:, place_cluster_N].numpy())
        return place_cluster_N[torch.from_numpy(column_N)]
    start_N = _greedy(cost_NK, capacity_K) if start_N is None else start_N
    return exchanged(cost_NK, start_N, max_sweeps)


def _greedy(cost_NK: Tensor, capacity_K: Tensor) -> Tensor:
    """Assigns points, round by round, to their cheapest cluster with room, those with most to lose first."""
    N, K = cost_NK.shape
    label_N, room_K = torch.full((N,), -1), capacity_K.clone()
    while bool((label_N < 0).any()):
        left_M = (label_N < 0).nonzero().squeeze(1)
        cost_MK = cost_NK[left_M].masked_fill(room_K <= 0, torch.inf)
        best_M2, wanted_M2 = cost_MK.topk(min(2, K), dim=1, largest=False)
        regret_M = best_M2[:, -1] - best_M2[:, 0]
        order_M = regret_M.argsort(descending=True, stable=True)
        order_M = order_M[wanted_M2[order_M, 0].argsort(stable=True)]
        wanted_M = wanted_M2[order_M, 0]
        count_K = torch.bincount(wanted_M, minlength=K)
        place_M = torch.arange(len(order_M)) - (count_K.cumsum(0) - count_K)[wanted_M]
        taken_M = place_M < room_K[wanted_M]
        label_N[left_M[order_M[taken_M]]] = wanted_M[taken_M]
        room_K = capacity_K - torch.bincount(label_N[label_N >= 0], minlength=K)
    return label_N


def exchanged(cost_NK: Tensor, label_N: Tensor, max_sweeps: int = _MAX_SWEEPS) -> Tensor:
    """Exchanges points of two clusters for as long as that lowers the cost; returns the labels."""
    K = cost_NK.shape[1]
    label_N = label_N.clone()
    slack = 1e-12 * float(cost_NK.abs().max().clamp_min(1e-30))
    for _ in range(max_sweeps):
        moved = False
        for a in range(K):
            for b in range(a + 1, K):
                moved |= _exchange(cost_NK, label_N, a, b, slack)
        if not moved:
            break
    return label_N


def _exchange(cost_NK: Tensor, label_N: Tensor, a: int, b: int, slack: float) -> bool:
    """Exchanges the points of two clusters that gain most, pair by pair; returns True if any gained."""
    in_a_P, in_b_P = (label_N == a).nonzero().squeeze(1), (label_N == b).nonzero().squeeze(1)
    loss_a_P, order_a_P = (cost_NK[in_a_P, b] - cost_NK[in_a_P, a]).sort(stable=True)
    loss_b_P, order_b_P = (cost_NK[in_b_P, a] - cost_NK[in_b_P, b]).sort(stable=True)
    pairs = min(len(in_a_P), len(in_b_P))
    # Both are sorted: the pairs that gain come first.
    gaining = int((loss_a_P[:pairs] + loss_b_P[:pairs] < -slack).sum())
    label_N[in_a_P[order_a_P[:gaining]]] = b
    label_N[in_b_P[order_b_P[:gaining]]] = a
    return gaining > 0


def squared_distances(points_ND: Tensor, centroids_KD: Tensor) -> Tensor:
    """Returns the ``[N, K]`` squared distances of points and centroids."""
    cross_NK = points_ND @ centroids_KD.t()
    norms_N1, norms_K = points_ND.square().sum(1, keepdim=True), centroids_KD.square().sum(1)
    return (norms_N1 - 2 * cross_NK + norms_K).clamp_min(0)


@torch.no_grad()
def balanced_kmeans(
    points_ND: Tensor,
    num_clusters: int,
    generator: Generator,
    max_rounds: int = 100,
    tolerance: float = 1e-4,
    exact_points: int = EXACT_POINTS,
) -> Clusters:
    """Runs k-means with clusters of one size (up to one point if K does not divide N).

    It starts from k-means++ and alternates balanced assignment and means, until no point changes its cluster
    or the sum of squared distances falls by less than a given share.

    Args:
        points_ND: ``[N, D]``, at least K of them.
        num_clusters: K.
        generator: Draws the start; on the CPU.
        max_rounds: Upper bound on rounds.
        tolerance: Smallest relative decrease.
        exact_points: As in `assign_balanced`.
    """
    assert len(points_ND) >= num_clusters, f"{len(points_ND)} points for {num_clusters} clusters"
    points_ND = points_ND.detach().double().cpu()
    centroids_KD = _start(points_ND, num_clusters, generator)
    label_N: Tensor | None = None
    rounds, total = 0, math.inf
    while rounds < max_rounds:
        rounds += 1
        cost_NK = squared_distances(points_ND, centroids_KD)
        before_N = label_N
        label_N = assign_balanced(cost_NK, None, exact_points, label_N, _KMEANS_SWEEPS)
        if before_N is not None and torch.equal(before_N, label_N):
            break
        centroids_KD = cluster_means(points_ND, label_N, num_clusters)
        before, total = total, float(cost_NK.gather(1, label_N[:, None]).sum())
        if before - total <= tolerance * total:
            break
    assert label_N is not None, max_rounds
    inertia = float((points_ND - centroids_KD[label_N]).square().sum())
    return Clusters(label_N, centroids_KD, inertia, rounds)


def cluster_means(points_ND: Tensor, label_N: Tensor, num_clusters: int) -> Tensor:
    """Returns the ``[K, D]`` mean of each cluster's points."""
    sums_KD = points_ND.new_zeros(num_clusters, points_ND.shape[1]).index_add_(0, label_N, points_ND)
    return sums_KD / torch.bincount(label_N, minlength=num_clusters).clamp_min(1)[:, None]


def _start(points_ND: Tensor, num_clusters: int, generator: Generator) -> Tensor:
    """Draws centroids by k-means++: each next one by its squared distance to those already drawn."""
    first = int(torch.randint(len(points_ND), (1,), generator=generator))
    chosen = [first]
    distance_N = (points_ND - points_ND[first]).square().sum(1)
    while len(chosen) < num_clusters:
        # Points that coincide with centroids have distance 0; if all do, any point will do.
        weight_N = distance_N if float(distance_N.sum()) > 0 else torch.ones_like(distance_N)
        weight_N = weight_N.scatter(0, torch.tensor(chosen), 0.0)
        if float(weight_N.sum()) == 0:
            weight_N = torch.ones_like(distance_N).scatter(0, torch.tensor(chosen), 0.0)
        # Drawn by the cumulative sum, as torch.multinomial is limited to 2^24 points.
        sums_N = weight_N.cumsum(0)
        place = torch.rand(1, generator=generator, dtype=torch.float64) * sums_N[-1]
        following = int(torch.searchsorted(sums_N, place, right=True).clamp_max(len(sums_N) - 1))
        chosen.append(following)
        distance_N = torch.minimum(distance_N, (points_ND - points_ND[following]).square().sum(1))
    return points_ND[chosen].clone()
