"""Balanced assignment and k-means, against every partition there is and by hand.

Letters: N points, K clusters.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from moe.upcycle.clustering import (
    assign_balanced,
    balanced_kmeans,
    cluster_means,
    equal_capacities,
    exchanged,
)


def cost_of(cost_NK: torch.Tensor, label_N: torch.Tensor) -> float:
    """Of an assignment."""
    return float(cost_NK[torch.arange(len(label_N)), label_N].sum())


def test_assignment_is_the_best_of_all() -> None:
    cost = torch.rand(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    every = set(itertools.permutations([0, 0, 1, 1, 2, 2]))
    best = min(cost_of(cost, torch.tensor(labels)) for labels in every)
    found = assign_balanced(cost)
    assert cost_of(cost, found) == pytest.approx(best)
    assert torch.bincount(found).tolist() == [2, 2, 2]


@pytest.mark.parametrize(("points", "clusters"), [(40, 4), (90, 7), (30, 29), (12, 1), (5, 5)])
def test_exchanges_come_near_the_best(points: int, clusters: int) -> None:
    generator = torch.Generator().manual_seed(points)
    cost = torch.rand(points, clusters, generator=generator, dtype=torch.float64)
    exact, near = assign_balanced(cost), assign_balanced(cost, exact_points=0)
    sizes = torch.bincount(near, minlength=clusters)
    assert torch.equal(sizes, equal_capacities(points, clusters))
    best, spread = cost_of(cost, exact), points / 2
    assert best <= cost_of(cost, near) + 1e-12
    # Within 3 % of what a random assignment costs above the best.
    assert cost_of(cost, near) - best <= 0.03 * (spread - best) + 1e-12


def test_no_exchange_of_two_points_is_left() -> None:
    cost = torch.rand(30, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    label = assign_balanced(cost, exact_points=0)
    total = cost_of(cost, label)
    for i, j in itertools.combinations(range(30), 2):
        other = label.clone()
        other[i], other[j] = label[j], label[i]
        assert cost_of(cost, other) >= total - 1e-12
    assert torch.equal(exchanged(cost, label), label)


def test_capacities_of_ones_own() -> None:
    # Point 0 would rather be in cluster 0, but loses less than the others by going to cluster 1.
    cost = torch.tensor([[0.0, 0.5], [0.0, 1.0], [0.0, 2.0]])
    for exact_points in (0, 10):
        assert assign_balanced(cost, torch.tensor([2, 1]), exact_points).tolist() == [1, 0, 0]


@pytest.mark.parametrize("exact_points", [0, 1024])
def test_kmeans_finds_clusters_that_are_there(exact_points: int) -> None:
    generator = torch.Generator().manual_seed(2)
    centres = 20 * torch.randn(5, 3, generator=generator)
    truth = torch.arange(60) % 5
    points = centres[truth] + torch.randn(60, 3, generator=generator)
    found = balanced_kmeans(points, 5, torch.Generator().manual_seed(0), exact_points=exact_points)
    assert torch.bincount(found.labels_N).tolist() == [12] * 5
    for cluster in range(5):
        assert len(set(truth[found.labels_N == cluster].tolist())) == 1
    expected = torch.stack([points[found.labels_N == k].double().mean(0) for k in range(5)])
    torch.testing.assert_close(found.centroids_KD, expected)
    inertia = sum(float((points[n].double() - expected[found.labels_N[n]]).square().sum()) for n in range(60))
    assert found.inertia == pytest.approx(inertia)


def test_kmeans_by_hand() -> None:
    # Three points near 0 and one near 10: balance moves the nearest of the three over.
    points = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    found = balanced_kmeans(points, 2, torch.Generator().manual_seed(0))
    assert found.labels_N[0] == found.labels_N[1] != found.labels_N[2] == found.labels_N[3]
    assert sorted(found.centroids_KD.flatten().tolist()) == [0.5, 6.0]
    # (0 - .5)^2 + (1 - .5)^2 + (2 - 6)^2 + (10 - 6)^2
    assert found.inertia == pytest.approx(32.5)


def test_kmeans_depends_on_the_generator_alone() -> None:
    points = torch.randn(50, 4, generator=torch.Generator().manual_seed(3))
    first, second = (balanced_kmeans(points, 4, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first.labels_N, second.labels_N)


def test_points_that_coincide() -> None:
    found = balanced_kmeans(torch.ones(9, 2), 3, torch.Generator().manual_seed(0))
    assert torch.bincount(found.labels_N).tolist() == [3, 3, 3] and found.inertia == 0
    assert cluster_means(torch.ones(2, 2), torch.tensor([0, 0]), 2).tolist() == [[1.0, 1.0], [0.0, 0.0]]
