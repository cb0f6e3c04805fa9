"""Information that planned runs give about a law, and optima that a law predicts.

Letters: R runs, P parameters of a law.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import Tensor

from moe.scaling_laws.base import Law
from moe.scaling_laws.objective import Objective

Array = NDArray[np.float64]

FLOPS_PER_PARAMETER = 6  # of a token's forward and backward pass, as all of these papers count


def standard_errors(
    law: Law, coefficients: Mapping[str, float], columns: Mapping[str, Array]
) -> dict[str, float]:
    """Computes the relative standard error of each coefficient per unit of noise, to first order.

    With noise s of the logarithm of the loss (its standard deviation, 1e-3 for 0.1 %), a fit to these runs
    has errors of about s times these, by the inverse of the Gauss-Newton matrix.

    Args:
        law: The law.
        coefficients: Its expected coefficients.
        columns: Its inputs in the planned runs, ``[R]`` each.

    Returns:
        Errors by parameter name; infinite for all if the runs cannot separate them.
    """
    values_P = law.vector(coefficients)
    losses = law.predict(coefficients, columns)
    theta_P = law.unconstrain(values_P[None])[0]
    jacobian_RP = Objective.of(law, {name: columns[name] for name in law.inputs}, losses, 1.0).row(theta_P)[1]
    # Converts changes of the searched coordinates to relative changes of the coefficients.
    change_PP = _derivatives(law, theta_P) / values_P[:, None]
    scale_P = np.linalg.norm(jacobian_RP, axis=0)
    if not scale_P.all():
        return dict.fromkeys(law.names, np.inf)
    _, singular_P, rows_PP = np.linalg.svd(jacobian_RP / scale_P, full_matrices=False)
    if singular_P[-1] < 1e-12 * singular_P[0]:
        return dict.fromkeys(law.names, np.inf)
    spread_PP = change_PP @ (rows_PP.T / singular_P / scale_P[:, None])
    return dict(zip(law.names, (float(e) for e in np.linalg.norm(spread_PP, axis=1)), strict=True))


def compute_optimum(coefficients: Mapping[str, float], flops: float) -> tuple[float, float]:
    """Computes the best size and token count under the law `chinchilla` for ``flops = 6 N D``.

    ``N = G (F/6)^(beta / (alpha+beta))``, ``G = (alpha A / (beta B))^(1 / (alpha+beta))`` (arXiv 2203.15556,
    eq. 4; 2502.05172, section 5).

    Returns:
        Parameters and tokens.
    """
    A, alpha, B, beta = (coefficients[name] for name in ("A", "alpha", "B", "beta"))
    scale = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
    params = scale * (flops / FLOPS_PER_PARAMETER) ** (beta / (alpha + beta))
    return params, flops / (FLOPS_PER_PARAMETER * params)


def at_fixed_experts(coefficients: Mapping[str, float], num_experts: float) -> dict[str, float]:
    """Converts the law `joint_moe` at one number of experts to `chinchilla` in active parameters.

    Source: arXiv 2502.05172, table 4.
    """
    p = coefficients
    gap = p["E_start"] * p["E_max"] / (p["E_max"] - p["E_start"])
    shifted = num_experts - 1 + gap
    experts = shifted * p["E_max"] / (shifted + p["E_max"])
    logarithm = float(np.log(experts))
    return {
        "A": p["a"] * experts ** p["delta"],
        "alpha": -(p["alpha"] + p["gamma"] * logarithm),
        "B": p["b"] * experts ** p["omega"],
        "beta": -(p["beta"] + p["zeta"] * logarithm),
        "E": p["c"],
    }


def best_sparsity(law: Law, coefficients: Mapping[str, float], params: float, flops: float) -> float:
    """Computes the sparsity of least loss under the law `apple`, at a size and ``F = 6 N (1 - S) D``."""

    def loss(active_log: float) -> float:
        share = float(np.exp(active_log))
        tokens = flops / (FLOPS_PER_PARAMETER * params * share)
        return float(law.predict(coefficients, {"params": params, "tokens": tokens, "sparsity": 1 - share}))

    # Searched in the logarithm of the active share, from one in a hundred thousand.
    grid = np.linspace(np.log(1e-5), 0.0, 200)
    least = int(np.argmin([loss(float(point)) for point in grid]))
    low, high = grid[max(least - 1, 0)], grid[min(least + 1, len(grid) - 1)]
    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-9})
    return float(1 - np.exp(found.x))


def best_size(
    law: Law, coefficients: Mapping[str, float], sparsity: float, flops: float
) -> tuple[float, float]:
    """Computes the total size of least loss under the law `apple` at a sparsity and compute, and the loss."""

    def loss(size_log: float) -> float:
        params = float(np.exp(size_log))
        tokens = flops / (FLOPS_PER_PARAMETER * params * (1 - sparsity))
        return float(law.predict(coefficients, {"params": params, "tokens": tokens, "sparsity": sparsity}))

    bounds = (np.log(1e6), np.log(1e14))
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-9})
    return float(np.exp(found.x)), float(found.fun)


def _derivatives(law: Law, theta_P: Array) -> Array:
    """Returns the derivatives of the coefficients by the searched coordinates, ``[P, P]``."""
    point = torch.from_numpy(theta_P.copy())
    found: Tensor = torch.func.jacrev(lambda theta: law.constrain(theta[None])[0])(point)
    return np.asarray(found.numpy())
