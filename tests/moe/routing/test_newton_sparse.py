"""Sinkhorn-Newton-Sparse: the published experiment on random costs, sharp plans, and what Hungarian finds.

Letters: T rows, E columns.
"""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moe.routing.newton_sparse import NewtonRule, sinkhorn_newton
from moe.routing.sinkhorn_rule import SinkhornRule
from moe.routing.transport import sinkhorn
from tests.moe.routing.test_transport import normal, scaled

pytestmark = pytest.mark.usefixtures("one_thread")


def l1_error(plan_TE: Tensor, row_T: Tensor, column_E: Tensor) -> float:
    """Of both marginals."""
    return float((plan_TE.sum(1) - row_T).abs().sum() + (plan_TE.sum(0) - column_E).abs().sum())


@pytest.mark.parametrize(
    ("kept_per_row", "fewest", "most"),
    # Steps that the reference measured: 61, 20, 12, 9, 8 (the paper: 9); the costs are other draws.
    [(2, 50, 72), (3, 15, 25), (4, 10, 14), (5, 7, 11), (15, 6, 9)],
)
def test_the_published_experiment(kept_per_row: int, fewest: int, most: int) -> None:
    n, eta = 500, 1200.0
    cost_TE = torch.rand(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mass = torch.full((n,), 1 / n, dtype=torch.float64)
    rule = NewtonRule(sinkhorn_iterations=20, kept_per_row=kept_per_row)
    found = sinkhorn_newton(-eta * cost_TE, mass, mass, rule)
    assert found.converged and found.error <= 1e-12
    assert fewest <= found.newton_steps <= most
    assert l1_error(found.plan(-eta * cost_TE), mass, mass) == pytest.approx(found.error, abs=1e-14)


def test_sinkhorn_alone_is_far_from_there() -> None:
    n, eta = 500, 1200.0
    cost_TE = torch.rand(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mass = torch.full((n,), 1 / n, dtype=torch.float64)
    found = sinkhorn(-eta * cost_TE, SinkhornRule(200, None), row_mass_T=mass, column_mass_E=mass)
    # It needs 260,560 iterations to 1e-12 on these costs (docs/routers/transport.md); Newton 8 after 20.
    assert l1_error(found.plan(-eta * cost_TE), mass, mass) > 1e-5


@pytest.mark.parametrize("solver", ["schur", "sparse_cg"])
@pytest.mark.parametrize(("T", "E"), [(40, 5), (5, 40), (7, 7), (6, 1), (1, 6)])
def test_any_marginals_agree_with_plain_scaling(solver: str, T: int, E: int) -> None:
    kernel_TE = 2 * normal(T, E)
    row_T, column_E = normal(T, seed=1).exp(), normal(E, seed=2).exp()
    column_E *= row_T.sum() / column_E.sum()
    found = sinkhorn_newton(kernel_TE, row_T, column_E, NewtonRule(2, solver=solver, stages=2))  # type: ignore[arg-type]
    assert found.converged
    torch.testing.assert_close(
        found.plan(kernel_TE), scaled(kernel_TE, row_T, column_E), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("xi", [0.05, 0.01, 0.002])
def test_routing_plans_by_the_schur_complement(xi: float) -> None:
    T, E = 1024, 12
    kernel_TE = (normal(T, E) + 1.5 * normal(E, seed=1)) / xi
    found = sinkhorn_newton(kernel_TE, rule=NewtonRule(solver="schur", stages=5))
    assert found.converged and found.newton_steps <= 20
    plan_TE = found.plan(kernel_TE)
    assert (plan_TE.sum(0) - T / E).abs().max() <= 1e-12 * T
    # One iteration of Sinkhorn finds nothing left to do.
    more = sinkhorn(kernel_TE + found.row_T[:, None] + found.column_E, SinkhornRule(1, None))
    assert (more.column_E - more.column_E[0]).abs().max() <= 1e-9


@pytest.mark.parametrize("solver", ["schur", "sparse_cg"])
@pytest.mark.parametrize(("n", "tau", "stages"), [(16, 1e-3, 6), (64, 1e-4, 9)])
def test_permutations_are_those_of_the_hungarian_algorithm(
    n: int, tau: float, stages: int, solver: str
) -> None:
    score_TE = normal(n, n)
    found = sinkhorn_newton(score_TE / tau, rule=NewtonRule(solver=solver, stages=stages, tolerance=1e-10))  # type: ignore[arg-type]
    assert found.converged
    plan_TE = found.plan(score_TE / tau)
    _, best_T = linear_sum_assignment(-score_TE.numpy())
    assert (plan_TE.argmax(1).numpy() == best_T).all() and plan_TE.amax(1).min() > 0.5


def test_without_stages_it_says_that_it_did_not_arrive() -> None:
    found = sinkhorn_newton(normal(16, 16) / 1e-4, rule=NewtonRule(5, max_newton_steps=3))
    assert not found.converged and found.error > 1e-3 and found.newton_steps <= 3
    assert found.row_T.isfinite().all() and found.column_E.isfinite().all()


def test_masses_must_match() -> None:
    with pytest.raises(AssertionError):
        sinkhorn_newton(normal(3, 2), torch.ones(3), torch.ones(2))
