"""Sinkhorn-Newton-Sparse: entropic optimal transport to machine precision where Sinkhorn alone is slow.

Source: Tang, Shavlovsky, Rahmanian, Tardini, Thekumparampil, Xiao, Ying, ICLR 2024 (arXiv 2401.12253), after
notes of it. The dual of ``max <K, P> - sum P log P`` with row sums r and column sums c is the concave ``f(u,
v) = r.u + c.v - sum exp(K + u + v)``; its gradient is the deficit of the sums, and its negative Hessian is
``[[diag(P 1), P], [P^T, diag(P^T 1)]]``. A few Sinkhorn updates come close to the solution, where P is almost
sparse, and a handful of Newton steps with the largest entries of P finish. If one side is small (E experts),
eliminating the other leaves an E x E system that needs neither sparsity nor conjugate gradients.

With the paper's cost C and sharpness eta, K is ``-eta C``, and its potentials are ``x = (u + 1) / eta`` and
``y = v / eta``.

Letters: T rows (tokens), E columns (experts), N kept entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe.routing.sinkhorn_rule import SinkhornRule
from moe.routing.transport import sinkhorn

# Sufficient increase of the line search (Armijo), and the shortest step it tries.
_ARMIJO = 1e-4
_SHORTEST_STEP = 2.0**-30
# Sharpness of a stage relative to the one before, and the tolerance of all but the last.
_STAGE_RATIO = 4.0
_STAGE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class NewtonRule:
    """Numbers of Sinkhorn and Newton steps, their solver and tolerances.

    Attributes:
        sinkhorn_iterations: Sinkhorn iterations before the first Newton step.
        max_newton_steps: Upper bound on Newton steps.
        tolerance: Stops once the L1 norm of both marginals' errors over the total mass is at most this.
        solver: ``sparse_cg``: conjugate gradients on the sparsified Hessian, the paper's. ``schur``: a direct
            solve with the E x E Schur complement of the full Hessian, at cost T*E^2, for small E.
        kept_per_row: Entries of P that ``sparse_cg`` keeps, in units of ``max(T, E)``.
        cg_tolerance: Relative residual at which conjugate gradients stop.
        stages: Kernels solved in sequence, each four times as sharp as the one before and started from its
            potentials; the last is the wanted one. 1 is the paper's method. Plans close to a permutation (few
            columns and a kernel that ranges over thousands) need about 6: Newton fails from a distant start.
    """

    sinkhorn_iterations: int = 20
    max_newton_steps: int = 100
    tolerance: float = 1e-12
    solver: Literal["sparse_cg", "schur"] = "sparse_cg"
    kept_per_row: int = 5
    cg_tolerance: float = 1e-10
    stages: int = 1


@dataclass(frozen=True)
class NewtonResult:
    """Potentials, with the steps and the error of the solution.

    Attributes:
        row_T: ``[T]`` u.
        column_E: ``[E]`` v.
        newton_steps: Newton steps taken.
        error: L1 norm of both marginals' errors over the total mass.
        converged: True if the tolerance was reached.
    """

    row_T: Tensor
    column_E: Tensor
    newton_steps: int
    error: float
    converged: bool

    def plan(self, kernel_TE: Tensor) -> Tensor:
        """Returns the ``[T, E]`` plan ``exp(K + u + v)``."""
        return (kernel_TE + self.row_T[:, None] + self.column_E).exp()


@torch.no_grad()
def sinkhorn_newton(
    kernel_TE: Tensor,
    row_mass_T: Tensor | None = None,
    column_mass_E: Tensor | None = None,
    rule: NewtonRule | None = None,
) -> NewtonResult:
    """Computes the potentials of the transport plan to (nearly) machine precision; one process, fp64.

    Args:
        kernel_TE: ``[T, E]`` scores over temperature (``-eta C``), T and E at least 1.
        row_mass_T: ``[T]`` positive row sums; 1 each by default.
        column_mass_E: ``[E]`` positive column sums with the same total; equal shares by default.
        rule: Stages, solver and tolerances.
    """
    rule = NewtonRule() if rule is None else rule
    kernel_TE = kernel_TE.double()
    T, E = kernel_TE.shape
    mass_T = kernel_TE.new_ones(T) if row_mass_T is None else row_mass_T.double()
    mass_E = mass_T.sum().expand(E) / E if column_mass_E is None else column_mass_E.double()
    total = float(mass_T.sum())
    assert math.isclose(total, float(mass_E.sum()), rel_tol=1e-9), (total, float(mass_E.sum()))
    state = _State(kernel_TE.new_zeros(T), kernel_TE.new_zeros(E), (mass_T, mass_E), rule)
    for stage in reversed(range(rule.stages)):
        sharpness = _STAGE_RATIO**-stage
        # The potentials of a kernel that is sharper by some factor are larger by about that factor.
        warmth = 1.0 if stage == rule.stages - 1 else _STAGE_RATIO
        state.row_T, state.column_E = warmth * state.row_T, warmth * state.column_E
        state.solve(sharpness * kernel_TE, rule.tolerance if stage == 0 else _STAGE_TOLERANCE)
    reached = state.error <= rule.tolerance
    return NewtonResult(state.row_T, state.column_E, state.steps, state.error, reached)


class _State:
    """Potentials between iterations."""

    def __init__(
        self, row_T: Tensor, column_E: Tensor, masses: tuple[Tensor, Tensor], rule: NewtonRule
    ) -> None:
        self.row_T, self.column_E = row_T, column_E
        self.mass_T, self.mass_E = masses
        self.rule = rule
        self.steps = 0
        self.error = math.inf

    def solve(self, kernel_TE: Tensor, tolerance: float) -> None:
        """Runs Sinkhorn, then Newton steps until the tolerance, the bound, or a step that does not help."""
        rule, total = self.rule, float(self.mass_T.sum())
        start = SinkhornRule(rule.sinkhorn_iterations, tolerance=None)
        near_TE = kernel_TE + self.row_T[:, None] + self.column_E
        found = sinkhorn(near_TE, start, row_mass_T=self.mass_T, column_mass_E=self.mass_E)
        self.row_T, self.column_E = self.row_T + found.row_T, self.column_E + found.column_E
        direction = _schur_direction if rule.solver == "schur" else _sparse_direction
        for _ in range(rule.max_newton_steps + 1):
            plan_TE = (kernel_TE + self.row_T[:, None] + self.column_E).exp()
            lack_T, lack_E = self.mass_T - plan_TE.sum(1), self.mass_E - plan_TE.sum(0)
            self.error = float(lack_T.abs().sum() + lack_E.abs().sum()) / total
            if self.error <= tolerance or self.steps >= rule.max_newton_steps:
                return
            step_T, step_E = direction(plan_TE, lack_T, lack_E, rule)
            slope = float(lack_T @ step_T + lack_E @ step_E)
            size = _line_search(plan_TE, step_T, step_E, (self.mass_T, self.mass_E), slope)
            if size == 0:
                return
            self.row_T, self.column_E = self.row_T + size * step_T, self.column_E + size * step_E
            self.steps += 1


def _line_search(
    plan_TE: Tensor, step_T: Tensor, step_E: Tensor, masses: tuple[Tensor, Tensor], slope: float
) -> float:
    """Returns the largest of 1, 1/2, 1/4, ... that increases f enough; 0 if none does."""
    exponent_TE = step_T[:, None] + step_E
    linear = float(masses[0] @ step_T + masses[1] @ step_E)
    # Close to the maximum the increase is smaller than the rounding error of the sums it is computed from.
    noise = 8 * torch.finfo(plan_TE.dtype).eps * (float(masses[0].sum()) + abs(linear))
    size = 1.0
    while size >= _SHORTEST_STEP:
        gain = size * linear - float((plan_TE * torch.expm1(size * exponent_TE)).sum())
        if gain >= _ARMIJO * size * slope - noise:
            return size
        size /= 2
    return 0.0


def _schur_direction(
    plan_TE: Tensor, lack_T: Tensor, lack_E: Tensor, rule: NewtonRule
) -> tuple[Tensor, Tensor]:
    """Computes Newton's direction with the full Hessian, by elimination of the rows.

    It solves ``(diag(P^T 1) - P^T diag(P 1)^-1 P) dv = lack_E - P^T diag(P 1)^-1 lack_T``. The matrix is the
    Laplacian of a graph of experts; its diagonal is computed as the sum of the row's other entries, which is
    exact where the difference would cancel (plans close to a permutation). Constants are its null space.
    """
    E = plan_TE.shape[1]
    row_T = plan_TE.sum(1)
    shares_TE = plan_TE / row_T[:, None]
    flow_EE = plan_TE.t() @ shares_TE
    flow_EE.fill_diagonal_(0)
    weight_E = flow_EE.sum(1)
    right_E = lack_E - shares_TE.t() @ lack_T
    # Scaled to a unit diagonal, so that experts with hardly any mass are solved for as well.
    scale_E = weight_E.clamp_min(torch.finfo(plan_TE.dtype).tiny).rsqrt()
    laplacian_EE = torch.diag(weight_E) - flow_EE
    scaled_EE = scale_E[:, None] * laplacian_EE * scale_E
    null_E = 1 / scale_E / torch.linalg.vector_norm(1 / scale_E)
    scaled_EE = scaled_EE + torch.outer(null_E, null_E)
    ridge_EE = 1e-14 * torch.eye(E, dtype=plan_TE.dtype, device=plan_TE.device)
    step_E = scale_E * torch.linalg.solve(scaled_EE + ridge_EE, scale_E * right_E)
    return lack_T / row_T - shares_TE @ step_E, step_E


def _sparse_direction(
    plan_TE: Tensor, lack_T: Tensor, lack_E: Tensor, rule: NewtonRule
) -> tuple[Tensor, Tensor]:
    """Computes Newton's direction with the largest entries of P, by Jacobi-scaled conjugate gradients."""
    T, E = plan_TE.shape
    kept = min(rule.kept_per_row * max(T, E), T * E)
    value_N, flat_N = plan_TE.reshape(-1).topk(kept, sorted=False)
    row_N, column_N = flat_N // E, flat_N % E
    diagonal = torch.cat([plan_TE.sum(1), plan_TE.sum(0)])
    scale = diagonal.clamp_min(torch.finfo(plan_TE.dtype).tiny).rsqrt()
    value_N = value_N * scale[row_N] * scale[T + column_N]
    # The kept block and its mirror image; after scaling the diagonal is 1.
    to_N, from_N = torch.cat([row_N, T + column_N]), torch.cat([T + column_N, row_N])
    value_N = value_N.repeat(2)

    def product(vector: Tensor) -> Tensor:
        return vector.index_add(0, to_N, value_N * vector[from_N])

    right = scale * torch.cat([lack_T, lack_E])
    solution = scale * _conjugate_gradients(product, right, rule.cg_tolerance, max_iterations=4 * (T + E))
    return solution[:T], solution[T:]


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor], right: Tensor, tolerance: float, max_iterations: int
) -> Tensor:
    """Solves ``product(x) = right`` for a positive semi-definite matrix."""
    solution = torch.zeros_like(right)
    rest = right.clone()
    direction = rest.clone()
    squared = float(rest @ rest)
    goal = squared * tolerance**2
    for _ in range(max_iterations):
        if squared <= goal:
            break
        image = product(direction)
        curvature = float(direction @ image)
        if curvature <= 0:
            break
        size = squared / curvature
        solution += size * direction
        rest -= size * image
        before, squared = squared, float(rest @ rest)
        direction = rest + (squared / before) * direction
    return solution
