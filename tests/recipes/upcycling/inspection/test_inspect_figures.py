"""Each figure of inspection by hand, or against the plainest formula."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor

from moe.experts.experts import Experts
from moe.experts.weights import ExpertBank
from moe.types import Routing
from recipes.models.hf.load_entropy import relative_entropy
from recipes.upcycling.inspection.likeness import (
    aligned_cosine,
    alignment,
    centred_gram,
    distances,
    linear_cka,
    mean_cosine,
    neurons,
    weight_cosine,
)
from recipes.upcycling.inspection.routing_figures import (
    bf16_move,
    chosen_mask,
    co_activation_lift,
    conditional_share,
    favourite_tokens,
    margins,
    vocabulary_specialisation,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_unused_slots_are_no_choices() -> None:
    used_TK = torch.tensor([[True, True], [True, False]])
    routing = Routing(torch.tensor([[0, 2], [1, 0]]), torch.ones(2, 2), 3, slot_mask_TK=used_TK)
    assert chosen_mask(routing).tolist() == [[True, False, True], [False, True, False]]


def test_relative_entropy_by_hand() -> None:
    """Two of four in halves: ln 2 / ln 4."""
    assert relative_entropy(torch.tensor([3.0, 3.0, 0.0, 0.0]).double()) == pytest.approx(0.5)
    assert relative_entropy(torch.ones(8).double()) == pytest.approx(1)
    assert relative_entropy(torch.ones(1).double()) == 1


def test_co_activation_by_hand() -> None:
    """Ten tokens, 4 with expert 0, 5 with expert 1, 4 with both; expert 2 has none."""
    together_EE = torch.tensor([[4, 4, 0], [4, 5, 0], [0, 0, 0]])
    lift_EE = co_activation_lift(together_EE, 10)
    assert float(lift_EE[0, 1]) == pytest.approx(10 * 4 / (4 * 5)) == float(lift_EE[1, 0])
    assert lift_EE[2, 0].isnan()
    share_EE = conditional_share(together_EE)
    assert float(share_EE[0, 1]) == 1 and float(share_EE[1, 0]) == pytest.approx(4 / 5)


def test_bf16_moves_numbers_by_no_more_and_by_that_much() -> None:
    """Judged by torch's own rounding: of all numbers in an octave the worst reaches the bound."""
    for low in (1.0, 0.25, -8.0):
        values = low * torch.linspace(1, 2, 20001, dtype=torch.float64)[:-1]
        moved = (values.to(torch.bfloat16).double() - values).abs()
        bound = bf16_move(values)
        assert bool((moved <= bound).all()) and float((moved / bound).max()) > 0.98
    assert bf16_move(torch.tensor([0.0])).isfinite().all()


def test_margins_by_hand() -> None:
    """Logits near 1 round by 2^-8 = 0.0039 at most, so that two move by 0.0078 together."""
    choice_TE = torch.tensor([[1.005, 1.0, 0.5, 0.2], [1.5, 1.2, 1.0, 0.2]]).double()
    chosen_TE = torch.tensor([[True, False, False, False], [True, True, False, False]])
    margin_T, near_T = margins(choice_TE, bf16_move(choice_TE), chosen_TE)
    assert margin_T.tolist() == pytest.approx([0.005, 0.2]) and near_T.tolist() == [True, False]


def test_margins_in_groups_leave_out_groups_that_were_shut() -> None:
    """Two groups; the second is shut, though its first expert is above the last chosen."""
    choice_TE = torch.tensor([[3.0, 1.0, 0.5, 2.0, 0.0, 0.0]]).double()
    chosen_TE = torch.tensor([[True, True, False, False, False, False]])
    margin_T, _ = margins(choice_TE, torch.zeros(1, 6).double(), chosen_TE, groups=2)
    assert margin_T.tolist() == [0.5]
    assert margins(choice_TE, torch.zeros(1, 6).double(), chosen_TE)[0].tolist() == [-1.0]
    everything_TE = torch.ones(1, 6, dtype=torch.bool)
    assert margins(choice_TE, torch.zeros(1, 6).double(), everything_TE)[0].tolist() == [torch.inf]


def test_vocabulary_by_hand() -> None:
    """Ids of 10, 20 and 2 occurrences; K = 1. Means of the largest shares: 8/10 and 15/20."""
    by_token_UE = torch.tensor([[8, 2], [5, 15], [2, 0]])
    seen_U = torch.tensor([10, 20, 2])
    mean, coverage = vocabulary_specialisation(by_token_UE, seen_U, 10)
    assert mean == pytest.approx((0.8 + 0.75) / 2) and coverage == pytest.approx(30 / 32)
    # Expert 0 has 15/32 of all: the first id is above that, the second is not, the third is too rare.
    assert favourite_tokens(by_token_UE, seen_U, 0, 10, 5) == [0]
    assert favourite_tokens(by_token_UE, seen_U, 0, 2, 5) == [2, 0]
    assert favourite_tokens(by_token_UE, seen_U, 1, 2, 5) == [1]
    assert torch.tensor(vocabulary_specialisation(by_token_UE, seen_U, 99)[0]).isnan()


def _hsic(k_NN: Tensor, l_NN: Tensor) -> float:
    """The mean over all fours of different tokens: the definition of the U-statistic (Song et al., Eq. 4)."""
    fours = list(permutations(range(len(k_NN)), 4))
    terms = (k_NN[i, j] * (l_NN[i, j] + l_NN[q, r] - 2 * l_NN[i, q]) for i, j, q, r in fours)
    return float(sum(terms)) / len(fours)


def test_cka_is_the_ratio_of_the_u_statistics() -> None:
    """On outputs that are alike in part, from their inner products as they are, not centred."""
    base = draw(7, 3)
    x, y = base + 2, base @ draw(3, 4, seed=1) + 0.3 * draw(7, 4, seed=2)
    k, u = x @ x.T, y @ y.T
    want = _hsic(k, u) / (_hsic(k, k) * _hsic(u, u)) ** 0.5
    got = linear_cka(torch.stack([centred_gram(x), centred_gram(y)]))
    assert float(got[0, 1]) == pytest.approx(want) and float(got[0, 0]) == pytest.approx(1)


def test_cka_of_the_unrelated_the_rotated_and_the_many() -> None:
    """Width 300 and 60 tokens: by the formula with its diagonal, unrelated outputs have about 0.8."""
    x, other = draw(60, 300), draw(60, 300, seed=1)
    rotated = 3 * x @ torch.linalg.qr(draw(300, 300, seed=2)).Q + 1
    got = linear_cka(torch.stack([centred_gram(part) for part in (x, other, rotated)]))
    assert abs(float(got[0, 1])) < 0.1 and float(got[0, 2]) == pytest.approx(1)
    a, b = (part - part.mean(0) for part in (x, other))
    plain = (a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert float(plain) > 0.7
    # Of many tokens and few widths, both formulas agree.
    a = draw(2000, 2)
    b = a @ draw(2, 3, seed=3) + draw(2000, 3, seed=4)
    a, b = a - a.mean(0), b - b.mean(0)
    plain = (a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    got = linear_cka(torch.stack([centred_gram(a), centred_gram(b)]))
    assert float(got[0, 1]) == pytest.approx(float(plain), abs=0.01)


def test_mean_cosine_by_hand() -> None:
    means_ED = torch.tensor([[3.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    assert mean_cosine(means_ED)[0].tolist() == pytest.approx([1, 0.5**0.5, 0])


def _experts(*ups: Tensor) -> Experts:
    """Experts of width 3 and model width 2, their down matrices made of their up matrices."""
    downs = torch.stack([up[:3].T for up in ups])
    return Experts(ExpertBank(torch.stack(ups).clone(), downs.clone(), "silu", gated=True))


def test_a_permuted_copy_is_found_by_alignment_and_a_copy_is_in_place() -> None:
    gate, up = draw(3, 2).float(), draw(3, 2, seed=1).float()
    order = torch.tensor([2, 0, 1])
    experts = _experts(torch.cat([gate, up]), torch.cat([gate, up]), torch.cat([gate[order], up[order]]))
    first, copy, permuted = (neurons(experts, expert) for expert in range(3))
    assert aligned_cosine(first, copy) == (pytest.approx(1), 1.0)
    cosine, stay = aligned_cosine(first, permuted)
    assert cosine == pytest.approx(1) and stay == 0
    # Neuron 0 of the first is where the order has 0.
    assert alignment(first, permuted).tolist() == [1, 2, 0]
    flat = [torch.cat([experts.w_up_EUD[e].flatten(), experts.w_down_EDF[e].flatten()]) for e in (0, 2)]
    found = weight_cosine(experts)
    want = torch.nn.functional.cosine_similarity(*flat, dim=0).detach()
    assert float(found[0, 1]) == pytest.approx(1) and float(found[0, 2]) == pytest.approx(float(want))


def test_distances_by_hand() -> None:
    """Experts of ones and of threes: their mean is two, each is half of it away; from ones 0 and 2."""
    one = torch.ones(6, 2)
    experts = _experts(one, 3 * one)
    assert distances(experts).tolist() == pytest.approx([0.5, 0.5])
    assert distances(experts, (one, torch.ones(2, 3))).tolist() == pytest.approx([0, 2])
