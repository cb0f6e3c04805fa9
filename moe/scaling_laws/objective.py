"""Huber loss of a law's residuals, its gradient, and a solver for many starts at once.

Letters: R runs, P parameters of a law, S starts (or bootstrap draws).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe.scaling_laws.base import Law

Array = NDArray[np.float64]

# Delta of the first steps of `solve_many`: far from the optimum every residual would count by its sign alone.
_WIDE_DELTA = 0.1
_WIDE_STEPS = 25
# After these steps, only the best start in this many continues.
_ONE_IN = 4
# Damping of the Gauss-Newton steps: its initial value, its factors after a good and a bad step, and its
# limit.
_DAMPING, _GENTLER, _HARSHER, _MOST = 1e-2, 0.3, 5.0, 1e6
# A step that gains less than this share of the objective is the last.
_REST = 1e-7


@dataclass(frozen=True)
class Objective:
    """Objective: the sum over runs of the Huber loss of ``ln predicted - ln measured``, over ``delta^2``.

    The unit matters: with residuals of 1e-3 the plain sum is near 1e-6, and an optimiser with an absolute
    tolerance stops at once (the error in arXiv 2203.15556 that 2404.10102 found).

    Attributes:
        law: The fitted law.
        columns: Its inputs, ``[R]`` each.
        log_losses: Logarithms of measured losses, ``[R]``.
        delta: Residual beyond which a run's weight stops growing.
    """

    law: Law
    columns: Mapping[str, Tensor]
    log_losses: Tensor
    delta: float

    @classmethod
    def of(cls, law: Law, columns: Mapping[str, Array], losses: Array, delta: float) -> Objective:
        """Creates the objective from arrays; ``losses`` are not yet logarithms."""
        tensors = {name: torch.from_numpy(columns[name].copy()) for name in law.inputs}
        return cls(law, tensors, torch.from_numpy(np.log(losses)), delta)

    def residuals(self, theta_SP: Tensor) -> Tensor:
        """Computes ``ln predicted - ln measured``, ``[S, R]``."""
        p = self.law.by_name(self.law.constrain(theta_SP))
        return self.law.log_loss(p, self.columns) - self.log_losses

    def jacobian(self, theta_SP: Tensor) -> tuple[Tensor, Tensor]:
        """Computes residuals ``[S, R]`` and their derivatives by the coordinates, ``[S, R, P]``."""
        S, P = theta_SP.shape
        R = len(self.log_losses)
        # A run's residual depends only on its start's coordinates: with a copy of these for every run, one
        # reverse pass over the sum gives all derivatives.
        copies = theta_SP[:, None].expand(S, R, P).reshape(S * R, P).requires_grad_()
        values_SRP = self.law.constrain(copies).view(S, R, P)
        p = {name: values_SRP[:, :, i] for i, name in enumerate(self.law.names)}
        residuals_SR = self.law.log_loss(p, self.columns) - self.log_losses
        (slopes,) = torch.autograd.grad(residuals_SR.sum(), copies)
        return residuals_SR.detach(), slopes.view(S, R, P)

    def value(self, theta_SP: Tensor, weights_SR: Tensor | None = None) -> Tensor:
        """Computes the objective of every start, ``[S]``; infinite where the law overflows."""
        size_SR = self.residuals(theta_SP).abs() / self.delta
        loss_SR = torch.where(size_SR <= 1, 0.5 * size_SR.square(), size_SR - 0.5)
        if weights_SR is not None:
            loss_SR = loss_SR * weights_SR
        return loss_SR.sum(1).nan_to_num(torch.inf, torch.inf)

    def value_and_gradient(self, theta_P: Array) -> tuple[float, Array]:
        """Computes value and gradient of one start, for scipy."""
        leaf = torch.from_numpy(theta_P.copy()).requires_grad_()
        value = self.value(leaf[None])[0]
        (gradient,) = torch.autograd.grad(value, leaf)
        if not (torch.isfinite(value) and torch.isfinite(gradient).all()):
            return 1e30, np.zeros_like(theta_P)  # makes a line search step back
        return float(value.detach()), gradient.numpy()

    def row(self, theta_P: Array) -> tuple[Array, Array]:
        """Computes residuals ``[R]`` and Jacobian ``[R, P]`` at one point."""
        residuals_SR, jacobian_SRP = self.jacobian(torch.from_numpy(theta_P[None].copy()))
        return residuals_SR[0].numpy(), jacobian_SRP[0].numpy()


@contextmanager
def one_thread() -> Iterator[None]:
    """Limits torch to one thread: on arrays this small, threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def solve_many(
    objective: Objective,
    theta_SP: Array,
    weights_SR: Array | None = None,
    steps: int = 100,
    near: bool = False,
) -> tuple[Array, Array]:
    """Minimises from many starts at once by damped Gauss-Newton steps with Huber's weights.

    Args:
        objective: The objective to minimise.
        theta_SP: Starts.
        weights_SR: Count of each run (one bootstrap draw per row); None for 1.
        steps: Upper bound on steps.
        near: True if the starts are near the optimum: all continue, and the wide first steps are skipped.

    Returns:
        The points reached from the best quarter of the starts (from all if `near`), and their objectives.
    """
    theta, weights = torch.from_numpy(theta_SP.copy()), None
    if weights_SR is not None:
        weights = torch.from_numpy(weights_SR)
    if not near:
        wide = replace(objective, delta=max(objective.delta, _WIDE_DELTA))
        theta, value_S = _descend(wide, theta, weights, _WIDE_STEPS)
        best_S = value_S.argsort(stable=True)[: -(-len(theta) // _ONE_IN)]
        theta, weights = theta[best_S], None if weights is None else weights[best_S]
    theta, value_S = _descend(objective, theta, weights, steps)
    return theta.numpy(), value_S.numpy()


def _descend(
    objective: Objective, theta_SP: Tensor, weights_SR: Tensor | None, steps: int
) -> tuple[Tensor, Tensor]:
    """Takes Levenberg-Marquardt steps; starts that have converged stay put."""
    low_P, high_P = (torch.from_numpy(side) for side in objective.law.box())
    theta_SP, value_S = theta_SP.clone(), objective.value(theta_SP, weights_SR)
    damping_S = torch.full_like(value_S, _DAMPING)
    moving = torch.arange(len(theta_SP))
    for _ in range(steps):
        here_SP, value, damping = theta_SP[moving], value_S[moving], damping_S[moving]
        weights = None if weights_SR is None else weights_SR[moving]
        trial_SP = _trial(objective, here_SP, damping, weights).clamp(low_P, high_P)
        trial = objective.value(trial_SP, weights)
        better = trial < value
        theta_SP[moving] = torch.where(better[:, None], trial_SP, here_SP)
        value_S[moving] = torch.where(better, trial, value)
        damping_S[moving] = (damping * torch.where(better, _GENTLER, _HARSHER)).clamp_min(1e-12)
        # A gain from infinity is NaN, so that the start continues.
        at_rest = torch.where(better, value - trial <= _REST * value, damping > _MOST)
        moving = moving[~at_rest]
        if not len(moving):
            break
    return theta_SP, value_S


def _trial(objective: Objective, theta_SP: Tensor, damping_S: Tensor, weights_SR: Tensor | None) -> Tensor:
    """Returns the points after one damped Gauss-Newton step from every start."""
    residuals_SR, jacobian_SRP = objective.jacobian(theta_SP)
    size_SR = residuals_SR.abs()
    delta = objective.delta
    huber_SR = torch.where(size_SR <= delta, 1.0, delta / size_SR.clamp_min(1e-300))
    if weights_SR is not None:
        huber_SR = huber_SR * weights_SR
    weighted_SRP = (jacobian_SRP * huber_SR[:, :, None]).nan_to_num(0.0, 0.0, 0.0)
    jacobian_SRP = jacobian_SRP.nan_to_num(0.0, 0.0, 0.0)
    normal_SPP = weighted_SRP.mT @ jacobian_SRP
    gradient_SP = (weighted_SRP * residuals_SR.nan_to_num(0.0, 0.0, 0.0)[:, :, None]).sum(1)
    # Scaled to a unit diagonal, so that the damping means the same for every coordinate.
    scale_SP = normal_SPP.diagonal(dim1=1, dim2=2).clamp_min(1e-30).rsqrt()
    scaled_SPP = normal_SPP * scale_SP[:, :, None] * scale_SP[:, None, :]
    damped_SPP = scaled_SPP + damping_S[:, None, None] * torch.eye(theta_SP.shape[1], dtype=theta_SP.dtype)
    step_SP, _ = torch.linalg.solve_ex(damped_SPP, scale_SP * gradient_SP)
    return torch.where(torch.isfinite(step_SP), theta_SP - scale_SP * step_SP, theta_SP)
