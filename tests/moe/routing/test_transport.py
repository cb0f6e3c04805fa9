"""Sinkhorn's iteration: two steps by hand, plain scaling, limits that linear programming knows, gradients.

Letters: T tokens, E experts.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from moe.routing.sinkhorn_rule import SinkhornRule
from moe.routing.transport import column_logsumexp, sinkhorn

pytestmark = pytest.mark.usefixtures("one_thread")
# exp(K) = [[1, 3], [1, 1]]; both tokens have mass 1, and so have both experts.
KERNEL_TE = torch.tensor([[1.0, 3.0], [1.0, 1.0]], dtype=torch.float64).log()


def normal(*shape: int, seed: int = 0) -> Tensor:
    """fp64 standard normal."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_one_iteration_with_rows_last_by_hand() -> None:
    found = sinkhorn(KERNEL_TE, SinkhornRule(max_iterations=1))
    # Column sums (2, 4), so exp(v) = (1/2, 1/4). Rows then (1/2 + 3/4, 1/2 + 1/4) = (5/4, 3/4).
    torch.testing.assert_close(found.column_E.exp(), torch.tensor([1 / 2, 1 / 4], dtype=torch.float64))
    torch.testing.assert_close(found.row_T.exp(), torch.tensor([4 / 5, 4 / 3], dtype=torch.float64))
    # The plan [[2/5, 3/5], [2/3, 1/3]] has the columns 16/15 and 14/15: each 1/15 off.
    expected_TE = torch.tensor([[2 / 5, 3 / 5], [2 / 3, 1 / 3]], dtype=torch.float64)
    torch.testing.assert_close(found.plan(KERNEL_TE), expected_TE)
    assert found.residual.item() == pytest.approx(math.sqrt(2) / 15)
    assert found.iterations.item() == 1


@pytest.mark.parametrize(
    ("residual", "expected"),
    # Columns (3/4, 5/4) before their update; exp(v) goes from (1, 1) to (4/3, 4/5).
    [("column_sums", math.sqrt(2) / 4), ("column_potentials", (1 / 3 + 1 / 5) / 2)],
)
def test_one_iteration_with_columns_last_by_hand(residual: str, expected: float) -> None:
    found = sinkhorn(KERNEL_TE, SinkhornRule(1, residual=residual, rows_last=False))  # type: ignore[arg-type]
    # Row sums (4, 2), so exp(u) = (1/4, 1/2). Columns (1/4 + 1/2, 3/4 + 1/2) = (3/4, 5/4).
    expected_TE = torch.tensor([[1 / 3, 3 / 5], [2 / 3, 2 / 5]], dtype=torch.float64)
    torch.testing.assert_close(found.plan(KERNEL_TE), expected_TE)
    assert found.residual.item() == pytest.approx(expected)


@pytest.mark.parametrize("rows_last", [True, False])
def test_the_limit_of_two_by_two_by_hand(rows_last: bool) -> None:
    # Scaling keeps the ratio ad / bc = 1 / 3 of [[a, b], [c, d]]; with all sums 1 the plan is
    # [[p, 1 - p], [1 - p, p]] with (p / (1 - p))^2 = 1 / 3.
    p = 1 / (1 + math.sqrt(3))
    found = sinkhorn(KERNEL_TE, SinkhornRule(200, 1e-14, rows_last=rows_last))
    expected_TE = torch.tensor([[p, 1 - p], [1 - p, p]], dtype=torch.float64)
    torch.testing.assert_close(found.plan(KERNEL_TE), expected_TE, rtol=1e-13, atol=0)


def scaled(kernel_TE: Tensor, row_mass_T: Tensor, column_mass_E: Tensor) -> Tensor:
    """The plan by plain multiplication of rows and columns, for long."""
    plan_TE = kernel_TE.exp()
    for _ in range(3000):
        plan_TE = plan_TE * (column_mass_E / plan_TE.sum(0))
        plan_TE = plan_TE * (row_mass_T / plan_TE.sum(1))[:, None]
    return plan_TE


@pytest.mark.parametrize("rows_last", [True, False])
def test_any_marginals_agree_with_plain_scaling(rows_last: bool) -> None:
    kernel_TE = 2 * normal(37, 5)
    row_T, column_E = normal(37, seed=1).exp(), normal(5, seed=2).exp()
    column_E *= row_T.sum() / column_E.sum()
    rule = SinkhornRule(2000, 1e-12, rows_last=rows_last)
    found = sinkhorn(kernel_TE, rule, row_mass_T=row_T, column_mass_E=column_E)
    plan_TE = found.plan(kernel_TE)
    torch.testing.assert_close(plan_TE, scaled(kernel_TE, row_T, column_E), rtol=1e-11, atol=0)
    assert found.residual <= 1e-12 and found.iterations < 2000


@pytest.mark.parametrize("rows_last", [True, False])
@pytest.mark.parametrize("residual", ["column_sums", "column_potentials"])
def test_how_often_the_host_looks_changes_nothing(rows_last: bool, residual: str) -> None:
    kernel_TE = 3 * normal(50, 6)
    rules = [
        SinkhornRule(100, 1e-3, residual, rows_last, every)  # type: ignore[arg-type]
        for every in (1, 7, 1000)
    ]
    first, *others = [sinkhorn(kernel_TE, rule) for rule in rules]
    assert 1 < first.iterations < 100 and first.residual <= 1e-3
    for other in others:
        assert all(torch.equal(getattr(first, name), getattr(other, name)) for name in vars(first))
    # The rule is met, and was not an iteration earlier.
    before = sinkhorn(kernel_TE, SinkhornRule(int(first.iterations) - 1, None, residual, rows_last))  # type: ignore[arg-type]
    assert before.residual > 1e-3 and before.iterations == first.iterations - 1


def test_residual_is_that_of_the_plan() -> None:
    kernel_TE = 3 * normal(50, 6)
    for iterations in (1, 2, 5):
        found = sinkhorn(kernel_TE, SinkhornRule(iterations, None))
        plan_TE = found.plan(kernel_TE)
        torch.testing.assert_close((plan_TE.sum(0) - 50 / 6).norm(), found.residual, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(plan_TE.sum(1), torch.ones(50, dtype=torch.float64))


@pytest.mark.parametrize("rows_last", [True, False])
def test_padding_has_no_mass(rows_last: bool) -> None:
    kernel_TE, mask_T, rule = 3 * normal(20, 4), torch.arange(20) % 3 != 1, SinkhornRule(rows_last=rows_last)
    kernel_TE[~mask_T] *= 1e6
    found, alone = sinkhorn(kernel_TE, rule, mask_T=mask_T), sinkhorn(kernel_TE[mask_T], rule)
    torch.testing.assert_close(found.column_E, alone.column_E, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.row_T[mask_T], alone.row_T, rtol=1e-12, atol=1e-12)
    assert (found.plan(kernel_TE)[~mask_T] == 0).all()


@pytest.mark.parametrize("rows_last", [True, False])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e5, 1e30])
@pytest.mark.parametrize(("T", "E"), [(0, 3), (1, 1), (1, 3), (5, 1), (2, 7), (40, 3)])
def test_potentials_are_finite(T: int, E: int, scale: float, rows_last: bool) -> None:
    for residual in ("column_sums", "column_potentials"):
        rule = SinkhornRule(20, 1e-4, residual, rows_last)  # type: ignore[arg-type]
        kernel_TE = (scale * normal(T, E)).float().requires_grad_()
        found = sinkhorn(kernel_TE, rule)
        assert found.column_E.isfinite().all() and found.row_T.isfinite().all()
        assert not found.residual.isnan()
        (found.column_E.sum() + found.row_T.sum()).backward()
        assert kernel_TE.grad is not None and kernel_TE.grad.isfinite().all()
        nothing = sinkhorn(kernel_TE, rule, mask_T=torch.zeros(T, dtype=torch.bool))
        assert nothing.column_E.isfinite().all()


def test_gradient_through_the_iterations() -> None:
    rule = SinkhornRule(6, tolerance=None)
    mask_T = torch.tensor([True, False, True, True, True])

    def column(kernel_TE: Tensor) -> Tensor:
        return sinkhorn(kernel_TE, rule, mask_T=mask_T).column_E

    assert torch.autograd.gradcheck(column, normal(5, 3).requires_grad_())
    # What stops on the way has the gradient of what it kept.
    for rows_last in (True, False):
        early = SinkhornRule(50, 1e-2, rows_last=rows_last, check_every=50)
        kernel_TE = normal(5, 3).requires_grad_()
        found = sinkhorn(kernel_TE, early)
        exact = SinkhornRule(int(found.iterations), None, rows_last=rows_last)
        grads = [
            torch.autograd.grad(sinkhorn(kernel_TE, r).column_E[0], kernel_TE)[0] for r in (early, exact)
        ]
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-15)


def test_column_logsumexp_of_nothing_is_finite() -> None:
    value_TE = torch.tensor([[0.0, -torch.inf], [0.0, -torch.inf]])
    found_E = column_logsumexp(value_TE)
    assert found_E[0].item() == pytest.approx(math.log(2))
    assert -torch.inf < found_E[1] < -1e37


def test_a_sharp_plan_comes_close_to_the_linear_programme() -> None:
    T, E, xi = 12, 3, 0.01
    score_TE = normal(T, E)
    rows = np.kron(np.eye(T), np.ones((1, E)))
    columns = np.kron(np.ones((1, T)), np.eye(E))
    wanted = np.concatenate([np.ones(T), np.full(E, T / E)])
    best = -linprog(-score_TE.numpy().ravel(), A_eq=np.vstack([rows, columns]), b_eq=wanted).fun
    found = sinkhorn(score_TE / xi, SinkhornRule(20000, 1e-9))
    value = float((found.plan(score_TE / xi) * score_TE).sum())
    # The plan maximises value + xi * entropy; the entropy of T rows of mass 1 is between 0 and T log E.
    assert best - xi * T * math.log(E) <= value <= best + 1e-8


@pytest.mark.parametrize(
    "fields", [{"max_iterations": 0}, {"check_every": 0}, {"tolerance": -1.0}, {"tolerance": math.nan}]
)
def test_rules_that_make_no_sense_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="Set (them|it) to"):
        SinkhornRule(**fields)  # type: ignore[arg-type]
