"""Grids of runs like those of the papers, and noise that their coefficients survive."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moe.scaling_laws.base import Law
from moe.scaling_laws.columns import Runs
from moe.scaling_laws.design import standard_errors

Array = NDArray[np.float64]

TRUTH = {
    "apple": "abnar-2025",
    "chinchilla": "besiroglu-2024",
    "clark": "s-base",
    "fine_grained": "krajewski-2024",
    "joint_moe": "ludziejewski-2025",
    "liew": "liew-2025",
}


def grid(**axes: object) -> dict[str, Array]:
    """All combinations of the values of the axes, as columns."""
    mesh = np.meshgrid(*(np.asarray(axis, dtype=np.float64) for axis in axes.values()), indexing="ij")
    return {name: values.ravel() for name, values in zip(axes, mesh, strict=True)}


def paper_grid(name: str) -> dict[str, Array]:
    """Inputs of runs as a paper made them, as far as that is known."""
    span = np.geomspace
    if name == "apple":
        sparsity = [0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98]
        return grid(params=span(1e8, 2e10, 6), tokens=span(2e9, 2e11, 6), sparsity=sparsity)
    if name == "chinchilla":
        return grid(params=span(44e6, 16e9, 12), tokens=span(5e9, 5e11, 12))
    if name == "clark":
        return grid(active_params=span(15e6, 1.3e9, 6), num_experts=2.0 ** np.arange(10))
    if name == "fine_grained":
        sizes = {"active_params": span(1.3e8, 3.7e9, 5), "tokens": span(1.6e10, 1.3e11, 5)}
        return grid(**sizes, granularity=[1, 2, 4, 8, 16])
    if name == "joint_moe":
        sizes = {"active_params": span(79e6, 2.7e9, 7), "tokens": span(5e8, 8e10, 7)}
        return grid(**sizes, num_experts=[1, 2, 4, 8, 16, 32])
    if name == "liew":
        sizes = {"dense_tokens": span(1e9, 1e11, 6), "tokens": span(1e9, 1e11, 6)}
        return grid(dense_params=span(1.5e7, 1e9, 5), **sizes)
    raise AssertionError(f"give the new law {name!r} a grid and its true coefficients here")


def surviving_noise(law: Law) -> float:
    """Noise of the logarithm at which 5 % is four standard errors of the worst coefficient.

    It is between 2e-5 and 2.5e-4 for these laws: weights are read off at one parameter and one token, ten
    orders of magnitude from the nearest run.
    """
    truth = law.preset(TRUTH[law.name]).coefficients
    return 0.05 / 4 / max(standard_errors(law, truth, paper_grid(law.name)).values())


def noisy_runs(
    law: Law, coefficients: dict[str, float], columns: dict[str, Array], noise: float, seed: int = 0
) -> Runs:
    """Runs whose losses the law gives, times noise."""
    losses = law.predict(coefficients, columns)
    losses = losses * np.exp(noise * np.random.default_rng(seed).standard_normal(len(losses)))
    return Runs("runs.csv", {**columns, "loss": losses})
