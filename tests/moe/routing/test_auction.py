"""Balanced assignment: by hand, against the Hungarian algorithm, and what it does with odd input.

Letters: T tokens, E experts.
"""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moe.routing.auction import balanced_assignment, fair_capacities
from tests.grid import each
from tests.moe.routing.test_transport import normal

pytestmark = pytest.mark.usefixtures("one_thread")


def value_of(affinity_TE: Tensor, expert_T: Tensor) -> float:
    """The sum of the chosen affinities."""
    return float(affinity_TE.gather(1, expert_T[:, None]).sum())


def optimum(affinity_TE: Tensor, capacity_E: Tensor) -> float:
    """The largest sum there is, by an expert's column once for each of its places."""
    wide = affinity_TE[:, torch.arange(affinity_TE.shape[1]).repeat_interleave(capacity_E)].numpy()
    return float(wide[linear_sum_assignment(-wide)].sum())


def test_two_tokens_that_want_the_same_expert() -> None:
    # 3 + 1 = 4 if token 0 gets expert 0, and 1 + 4 = 5 if token 1 does. Expert 0 bids 4 - 3 and a step for
    # token 1; expert 1, to which both are worth 1, ends up with the one that is cheap.
    affinity_TE = torch.tensor([[3.0, 1.0], [4.0, 1.0]])
    found = balanced_assignment(affinity_TE)
    assert found.expert_T.tolist() == [1, 0] and found.rounds <= 2


def test_a_held_token_is_won_back() -> None:
    # The step is 5/50 = 0.1. Expert 0 bids 2.1 for token 1, expert 1 bids 5 - 3 + 0.1 for token 2 and
    # expert 2 only 5 - 4 + 0.1. Then expert 1 defends token 2 with 0.1 and loses it to the 2.9 - 1.9 + 0.1
    # of expert 2; token 0 is left for it: 2 + 2 + 5 = 9. With its surplus, 3.1, it would have kept token 2:
    # 1 + 2 + 5 = 8.
    found = balanced_assignment(torch.tensor([[0.0, 2.0, 1.0], [2.0, 3.0, 4.0], [0.0, 5.0, 5.0]]))
    assert found.expert_T.tolist() == [1, 0, 2] and found.rounds == 3


@each("kind", ["normal", "skewed"])
@each(("T", "E"), [(256, 8), (1024, 16), (512, 4), (96, 12), (16, 16), (300, 3)])
def test_the_shortfall_is_a_small_part_of_a_step(T: int, E: int, kind: str) -> None:
    affinity_TE = normal(T, E) + (1.5 * normal(E, seed=1) if kind == "skewed" else 0)
    capacity_E = fair_capacities(affinity_TE)
    found = balanced_assignment(affinity_TE, capacity_E)
    lost = optimum(affinity_TE, capacity_E) - value_of(affinity_TE, found.expert_T)
    step = float(affinity_TE.max() - affinity_TE.min()) / 50
    assert -1e-9 <= lost <= T * step / 8 and found.rounds <= 15


def test_the_popular_experts_get_what_is_left_over() -> None:
    # Seven tokens for three experts: two each, and one more for the expert that most of them want.
    affinity_TE = torch.tensor([[0.0, 5.0, 0.0]] * 5 + [[5.0, 0.0, 0.0]] * 2)
    assert fair_capacities(affinity_TE).tolist() == [2, 3, 2]
    counts_E = torch.bincount(balanced_assignment(affinity_TE).expert_T, minlength=3)
    assert counts_E.tolist() == [2, 3, 2]


@each("kind", ["normal", "skewed", "correlated", "equal"])
@each(("T", "E"), [(256, 8), (250, 8), (96, 12), (7, 16), (16, 16), (1, 5), (5, 1), (1, 1), (300, 3)])
@each("max_rounds", [100, 2, 0])
def test_exactly_balanced_and_close_to_the_optimum(T: int, E: int, kind: str, max_rounds: int) -> None:
    affinity_TE = normal(T, E)
    if kind == "skewed":
        affinity_TE += 1.5 * normal(E, seed=1)
    if kind == "correlated":
        affinity_TE = normal(T, 1) * normal(1, E, seed=1) + 0.01 * affinity_TE
    if kind == "equal":
        affinity_TE = torch.ones(T, E)
    capacity_E = fair_capacities(affinity_TE)
    assert capacity_E.sum() == T and capacity_E.max() - capacity_E.min() <= 1
    found = balanced_assignment(affinity_TE, max_rounds=max_rounds)
    assert torch.equal(torch.bincount(found.expert_T, minlength=E), capacity_E)
    assert found.rounds <= max_rounds
    if max_rounds == 100:
        # Not more than the price step, 1/50 of the range, is lost on a token.
        lost = optimum(affinity_TE, capacity_E) - value_of(affinity_TE, found.expert_T)
        step = max(float(affinity_TE.max() - affinity_TE.min()) / 50, 1e-4)
        assert -1e-9 <= lost <= T * step
        assert found.rounds < 50


def test_given_capacities_are_met() -> None:
    affinity_TE, capacity_E = normal(60, 4), torch.tensor([0, 40, 15, 5])
    found = balanced_assignment(affinity_TE, capacity_E)
    assert torch.equal(torch.bincount(found.expert_T, minlength=4), capacity_E)
    lost = optimum(affinity_TE, capacity_E) - value_of(affinity_TE, found.expert_T)
    assert -1e-9 <= lost <= 60 / 50 * float(affinity_TE.max() - affinity_TE.min())


@each("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_counts_as_the_smallest(value: float) -> None:
    affinity_TE = normal(12, 3)
    other_TE = affinity_TE.clone()
    affinity_TE[4, 1] = value
    other_TE[4, 1] = torch.cat([other_TE.flatten()[:13], other_TE.flatten()[14:]]).min()
    assert torch.equal(balanced_assignment(affinity_TE).expert_T, balanced_assignment(other_TE).expert_T)
    nothing = balanced_assignment(torch.full((6, 3), value))
    assert torch.bincount(nothing.expert_T).tolist() == [2, 2, 2]


@each("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_any_scale_and_offset(scale: float) -> None:
    found = balanced_assignment((scale * normal(40, 4)).float() + scale * 1e3)
    assert torch.bincount(found.expert_T).tolist() == [10] * 4
    assert len(balanced_assignment(normal(0, 4)).expert_T) == 0
