"""Divisions of neurons, worked by hand.

Letters: E experts, F neurons.
"""

from __future__ import annotations

import collections
import itertools

import pytest
import torch
from torch import Tensor

from moe.upcycle.neuron_split import (
    coactivation_groups,
    greedy_groups,
    groups_of,
    marker_groups,
    most_wanted,
    random_groups,
    snake_groups,
    top_groups,
)
from tests.grid import each


def is_partition(groups_EM: Tensor, width: int) -> bool:
    """Whether every neuron is in one group."""
    return groups_EM.flatten().sort().values.tolist() == list(range(width))


def test_groups_of_labels() -> None:
    assert groups_of(torch.tensor([1, 0, 1, 0]), 2).tolist() == [[1, 3], [0, 2]]
    with pytest.raises(AssertionError, match=r"groups of sizes \[3, 1\]"):
        groups_of(torch.tensor([0, 0, 1, 0]), 2)


def test_every_division_uses_each_neuron_once() -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(4, 24, generator=generator)
    pairs = torch.rand(24, 24, generator=generator)
    marks = (torch.rand(30, 24, generator=generator) < 0.3).float()
    divisions = {
        "random": random_groups(24, 4, generator),
        "snake": snake_groups(score[0], 4),
        "greedy": greedy_groups(score),
        "coactivation": coactivation_groups(pairs + pairs.t(), 4, generator),
        "markers": marker_groups(marks, marks.mean(0), 4)[0],
    }
    for name, groups in divisions.items():
        assert groups.shape == (4, 6) and is_partition(groups, 24), name


def test_snake_by_hand() -> None:
    # By falling score: neurons 5 4 3 2 1 0. Rows of two: (5 4), then (3 2) reversed, then (1 0).
    groups = snake_groups(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), 2)
    assert groups.tolist() == [[1, 2, 5], [0, 3, 4]]


def test_greedy_by_hand() -> None:
    # 9 takes neuron 0 for expert 0; 8 takes neuron 1 for expert 0, which is full; of the rest, neurons 2
    # and 3 go to expert 1 though expert 0 wants neuron 2 more.
    score = torch.tensor([[9.0, 8.0, 7.0, 0.0], [1.0, 2.0, 3.0, 0.0]])
    assert greedy_groups(score).tolist() == [[0, 1], [2, 3]]
    # Everything ties: lower experts take lower neurons.
    assert greedy_groups(torch.zeros(2, 4)).tolist() == [[0, 1], [2, 3]]


def test_top_groups_and_most_wanted_by_hand() -> None:
    score = torch.tensor([[5.0, 4.0, 0.0, 1.0], [0.0, 4.0, 5.0, 1.0], [0.0, 6.0, 1.0, 3.0]])
    assert top_groups(score, 2).tolist() == [[0, 1], [1, 2], [1, 3]]
    # Neuron 1 is on three lists. Without it they are {0, 3}, {2, 3}, {2, 3}: neuron 3 is on three. Without
    # that all lists are {0, 2}, of which the lower is taken first.
    assert most_wanted(score, 2, 1).tolist() == [1]
    assert most_wanted(score, 2, 2).tolist() == [1, 3]
    assert most_wanted(score, 2, 3).tolist() == [0, 1, 3]
    assert most_wanted(score, 2, 4).tolist() == [0, 1, 2, 3]
    # Everything ties: lower neurons.
    assert most_wanted(torch.zeros(3, 6), 2, 3).tolist() == [0, 1, 2]


@each("seed", range(4))
def test_most_wanted_by_lists(seed: int) -> None:
    # The rule with plain lists: 5 experts of 6 neurons of 36, 6 shared.
    score = torch.rand(5, 36, generator=torch.Generator().manual_seed(seed))
    lists = [sorted(range(36), key=row.__getitem__, reverse=True) for row in score.tolist()]
    shared: list[int] = []
    while len(shared) < 6:
        counts = collections.Counter(neuron for ranked in lists for neuron in ranked[:6])
        most = max(counts.values())
        shared += sorted(n for n in counts if counts[n] == most)[: 6 - len(shared)]
        lists = [[n for n in ranked if n not in shared] for ranked in lists]
    assert most_wanted(score, 6, 6).tolist() == sorted(shared)


def cut_of(weight_FF: Tensor, groups_EM: Tensor) -> float:
    """Weight inside of groups."""
    return sum(float(weight_FF[group][:, group].sum()) for group in groups_EM)


def test_the_partition_of_a_graph_is_near_the_best() -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.rand(8, 8, generator=generator)
    weight = (weight + weight.t()).fill_diagonal_(0)
    best = 0.0
    for half in itertools.combinations(range(8), 4):
        other = [i for i in range(8) if i not in half]
        best = max(best, cut_of(weight, torch.tensor([list(half), other])))
    found = cut_of(weight, coactivation_groups(weight, 2, generator))
    assert best * 0.98 <= found <= best * (1 + 1e-6)


def test_groups_that_fire_together_are_found() -> None:
    truth = torch.arange(32) % 4
    generator = torch.Generator().manual_seed(6)
    noise = torch.rand(32, 32, generator=generator)
    weight = (truth[:, None] == truth).float() + 0.4 * (noise + noise.t())
    groups = coactivation_groups(weight, 4, generator)
    assert all(len(set(truth[group].tolist())) == 1 for group in groups)
    # Neurons that never fire have no edges.
    lonely = torch.zeros(8, 8)
    assert is_partition(coactivation_groups(lonely, 2, generator), 8)


def test_markers_by_hand() -> None:
    # Neurons 0 and 2 are marked by tokens 0 to 2, neurons 1 and 3 by tokens 3 and 4; 0 and 1 most often.
    marks = torch.tensor(
        [[1, 0, 1, 0], [1, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 1], [0, 1, 0, 0]], dtype=torch.float32
    )
    groups, members = marker_groups(marks, torch.tensor([0.6, 0.4, 0.3, 0.2]), 2)
    assert groups.tolist() == [[0, 2], [1, 3]]
    # Both of a pair are as far from its mean: the first.
    assert members.tolist() == [0, 1]
    # Of three, the one in the middle: distances to (1, 2/3, 1/3) are 1, 2/3 and 4/3 for 3, 2 and 1 marks.
    three = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.float32)
    groups, members = marker_groups(three, torch.tensor([0.3, 0.2, 0.1]), 1)
    assert groups.tolist() == [[0, 1, 2]] and members.tolist() == [1]
