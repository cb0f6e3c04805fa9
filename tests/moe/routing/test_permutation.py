"""The learned permutation: Sinkhorn, hardening and schedule by hand, against slow references, and a search.

Letters: E experts.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from moe.routing.permutation import PermutationSearch, harden, log_sinkhorn
from moe.routing.permutation_config import PermutationConfig

CONFIG = PermutationConfig(steps=4)


def _scores(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def test_one_iteration_worked_by_hand() -> None:
    # [[4, 1], [1, 1]]: rows to [[4/5, 1/5], [1/2, 1/2]]; columns sum to 13/10 and 7/10.
    found = log_sinkhorn(_scores([[4.0, 1.0], [1.0, 1.0]]), 1.0, 1).exp()
    torch.testing.assert_close(found, torch.tensor([[8 / 13, 2 / 7], [5 / 13, 5 / 7]]).double())
    # At temperature 1/2 the entries are squared first: columns 16/17 + 1/2 and 1/17 + 1/2.
    found = log_sinkhorn(_scores([[4.0, 1.0], [1.0, 1.0]]), 0.5, 1).exp()
    columns = (16 / 17 + 1 / 2, 1 / 17 + 1 / 2)
    expected = [[16 / 17 / columns[0], 1 / 17 / columns[1]], [1 / 2 / columns[0], 1 / 2 / columns[1]]]
    torch.testing.assert_close(found, torch.tensor(expected).double())


def test_the_limit_worked_by_hand() -> None:
    # Scaling rows and columns keeps p00 p11 / (p01 p10) = 4; with sums of 1 it is (p / (1 - p))^2: p = 2/3.
    found = log_sinkhorn(_scores([[4.0, 1.0], [1.0, 1.0]]), 1.0, 50).exp()
    torch.testing.assert_close(found, torch.tensor([[2 / 3, 1 / 3], [1 / 3, 2 / 3]]).double())


@pytest.mark.parametrize("iterations", [1, 2, 30])
def test_sinkhorn_by_plain_division(iterations: int) -> None:
    scores_EE = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slow = (scores_EE / 0.3).exp()
    for _ in range(iterations):
        for row in range(6):
            slow[row] = slow[row] / slow[row].sum()
        for column in range(6):
            slow[:, column] = slow[:, column] / slow[:, column].sum()
    torch.testing.assert_close(log_sinkhorn(scores_EE, 0.3, iterations).exp(), slow, rtol=1e-12, atol=0)


def test_schedule_worked_by_hand() -> None:
    assert [CONFIG.temperature(step) for step in (0, 1, 2, 4, 9)] == pytest.approx(
        [1e-3, 1e-4, 1e-5, 1e-7, 1e-7], rel=1e-12
    )
    # 20 + 130/4 = 52.5, which rounds to the even 52; 20 + 65 = 85
    assert [CONFIG.iterations(step) for step in (0, 1, 2, 4, 9)] == [20, 52, 85, 150, 150]


def test_hardening_is_the_best_assignment_and_not_the_greedy_one() -> None:
    # The greedy choice is 0.9 + 0.1; the best 0.8 + 0.8.
    found = harden(_scores([[0.9, 0.8], [0.8, 0.1]]), torch.zeros(2, 2))
    assert found.tolist() == [1, 0]
    for seed in range(5):
        p_EE = torch.rand(5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        best = max(itertools.permutations(range(5)), key=lambda o: sum(p_EE[i, o[i]] for i in range(5)))
        assert harden(p_EE.log(), torch.zeros(5, 5)).tolist() == list(best)


def test_scores_decide_between_what_is_equal() -> None:
    # Row 0 has column 2; of rows 1 and 2 nothing is left, and the scores want 1 -> 1 and 2 -> 0.
    log_p_EE = torch.full((3, 3), -torch.inf)
    log_p_EE[0, 2] = 0.0
    scores_EE = torch.tensor([[0.0, 0.0, 0.0], [0.1, 0.3, 0.0], [0.3, 0.1, 0.0]])
    assert harden(log_p_EE, scores_EE).tolist() == [2, 1, 0]


def _search(scores: list[list[float]], config: PermutationConfig) -> PermutationSearch:
    search = PermutationSearch(config, len(scores)).double()
    search.reset_parameters(torch.Generator().manual_seed(0))
    with torch.no_grad():
        search.scores_EE.copy_(torch.tensor(scores))
    return search


def test_the_soft_matrix_worked_by_hand() -> None:
    # One iteration at temperature 1, as above, then rows: 8/13 : 2/7 = 56 : 26, 5/13 : 5/7 = 7 : 13.
    config = PermutationConfig(steps=1, log10_tau_start=0.0, iterations_start=1)
    search = _search([[math.log(4), 0.0], [0.0, 0.0]], config)
    found = search.soft(0)
    torch.testing.assert_close(
        found.matrix_EE, torch.tensor([[56 / 82, 26 / 82], [7 / 20, 13 / 20]]).double(), rtol=1e-6, atol=0
    )

    def entropy(*p: float) -> float:
        return -sum(q * math.log(q) for q in p)

    columns = entropy(8 / 13, 5 / 13) + entropy(2 / 7, 5 / 7)
    rows = entropy(56 / 82, 26 / 82) + entropy(7 / 20, 13 / 20)
    assert found.entropy.item() == pytest.approx(columns + rows, rel=1e-6)


@pytest.mark.parametrize("num_experts", [1, 2, 5, 8, 64])
def test_the_end_of_the_schedule_is_a_finite_permutation_of_rows_of_sum_one(num_experts: int) -> None:
    search = PermutationSearch(CONFIG, num_experts)
    search.reset_parameters(torch.Generator().manual_seed(num_experts))
    for step in range(5):
        soft = search.soft(step)
        torch.testing.assert_close(
            soft.matrix_EE.sum(1), torch.ones(num_experts).double(), rtol=1e-12, atol=0
        )
        assert soft.entropy.isfinite() and (soft.entropy >= -1e-12)
        grads = torch.autograd.grad(soft.entropy + soft.matrix_EE[0].square().sum(), search.scores_EE)
        assert grads[0].isfinite().all()
        search.advance(step)
        assert search.column_E.sort().values.tolist() == list(range(num_experts))


def test_gradients_agree_with_finite_differences() -> None:
    config = PermutationConfig(steps=10, log10_tau_start=-1.0, log10_tau_end=-1.0, iterations_start=7)
    scores_EE = 0.1 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    search = _search(scores_EE.tolist(), config)
    upstream_EE = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    del search.scores_EE  # a plain attribute takes its place

    def total(scores_EE: Tensor) -> Tensor:
        search.scores_EE = scores_EE  # type: ignore[assignment]
        soft = search.soft(3)
        return (soft.matrix_EE * upstream_EE).sum() + soft.entropy

    assert torch.autograd.gradcheck(total, (scores_EE.requires_grad_(),))


def test_the_search_ends_once_and_for_all() -> None:
    search = PermutationSearch(CONFIG, 3)
    search.reset_parameters(torch.Generator().manual_seed(0))
    with torch.no_grad():
        search.scores_EE.copy_(torch.tensor([[0.0, 9.0, 0.0], [0.0, 0.0, 9.0], [9.0, 0.0, 0.0]]))
    assert search.is_searching(0) and search.is_searching(3) and not search.is_searching(4)
    search.advance(3)
    assert search.column_E.tolist() == [1, 2, 0] and not search.is_frozen
    search.advance(4)
    assert search.is_frozen and not search.is_searching(0)
    with torch.no_grad():
        search.scores_EE.copy_(9 * torch.eye(3))
    search.advance(5)
    assert search.column_E.tolist() == [1, 2, 0]
    other = PermutationSearch(CONFIG, 3)
    other.load_state_dict(search.state_dict(), strict=True)
    assert other.column_E.tolist() == [1, 2, 0] and not other.is_searching(0)
    search.reset_parameters(torch.Generator().manual_seed(1))
    assert search.is_searching(0)


@pytest.mark.parametrize("tau_start", [-1.0, -3.0])
def test_a_search_finds_the_permutation_that_the_loss_wants(
    tau_start: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prints the figures of docs/routers/trees.md: COMET's temperatures are almost hard from the start."""
    E, steps = 8, 100
    g = torch.Generator().manual_seed(3)
    cost_EE = torch.rand(E, E, generator=g, dtype=torch.float64)
    lowest = float(cost_EE[torch.arange(E), harden(-cost_EE, -cost_EE)].sum())
    search = PermutationSearch(PermutationConfig(steps=steps, log10_tau_start=tau_start), E)
    search.reset_parameters(torch.Generator().manual_seed(0))
    first = float(cost_EE[torch.arange(E), search.column_E].sum())
    optimizer = torch.optim.Adam(search.parameters(), lr=5e-3)
    for step in range(steps):
        soft = search.soft(step)
        optimizer.zero_grad()
        ((soft.matrix_EE * cost_EE).sum() + 1e-4 * soft.entropy).backward()
        optimizer.step()
        search.advance(step + 1)
    last = float(cost_EE[torch.arange(E), search.column_E].sum())
    with capsys.disabled():
        print(f"\nsearch from log10 tau {tau_start}: cost {first:.3f} -> {last:.3f}, lowest {lowest:.3f}")
    assert search.is_frozen and last < first
    assert last == pytest.approx(lowest, rel=0.01) or tau_start == -3.0
