"""Fit of a law to a table of runs: Huber loss on the logarithm, many starts, L-BFGS, bootstrap.

Letters: R runs, P parameters of a law, S starts, B bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.stats import qmc

from moe.errors import DataError, Mistake
from moe.scaling_laws.base import Law, Parameter
from moe.scaling_laws.columns import COLUMNS, Runs, with_sparsity
from moe.scaling_laws.objective import Objective, one_thread, solve_many

Array = NDArray[np.float64]

SPARE_RUNS = 2  # smallest excess of runs over coefficients
HELD_OUT = 0.2
# Singular values below this share of the largest belong to directions that the runs do not determine.
_NULL = 1e-9
# A bootstrap interval that spans more than this factor tells next to nothing.
_HUGE = 10.0
# A coefficient is undetermined if equally good fits differ by this factor.
_APART = 2.0


@dataclass(frozen=True)
class FitOptions:
    """Options of a fit.

    Attributes:
        delta: Residual of the logarithm beyond which a run's weight stops growing (1e-3 in arXiv 2203.15556).
        starts: Starting points, a Sobol sequence in the box of the law; a power of two covers it most evenly.
        finish: Number of best distinct starts that L-BFGS finishes.
        bootstrap: Resamplings of the runs; 0 for none.
        level: Coverage probability of intervals.
        seed: Seed of starts and resamplings.
        hold_out: Also fits without the runs of lowest loss, and measures the error on them.
    """

    delta: float = 1e-3
    starts: int = 128
    finish: int = 2
    bootstrap: int = 200
    level: float = 0.95
    seed: int = 0
    hold_out: bool = True


@dataclass(frozen=True)
class Fit:
    """Law fitted to runs.

    Attributes:
        law: The law.
        coefficients: Values by parameter name.
        intervals: Percentile interval of each coefficient; None without a bootstrap.
        draws: The bootstrap's coefficients, ``[B, P]``; ``[0, P]`` without one.
        level: Probability of the intervals.
        ranges: Smallest and largest value of each input in the runs.
        count: Number of runs.
        rmse: Root mean square error of the logarithm of the loss.
        held_out_rmse: The same on the runs of lowest loss, fitted without them; None if not measured.
        objective: Huber loss at the optimum, in units of delta^2.
        agreeing_starts: Share of the finished starts that agree on the objective to 1 %.
        residuals: ``ln predicted - ln measured``, ``[R]``.
        undetermined: Parameter name to the reason why its value is unreliable.
        notes: Further remarks, one sentence each.
    """

    law: Law
    coefficients: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]] | None
    draws: Array
    level: float
    ranges: Mapping[str, tuple[float, float]]
    count: int
    rmse: float
    held_out_rmse: float | None
    objective: float
    agreeing_starts: float
    residuals: Array
    undetermined: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def select(law: Law, runs: Runs) -> tuple[dict[str, Array], Array]:
    """Returns the inputs of a law and the losses, if they can be fitted.

    Raises:
        DataError: A column is missing, partly empty or constant, or there are too few runs (all mistakes).
    """
    mistakes = []
    for name in ("loss", *law.inputs):
        if name not in runs.columns:
            meaning = COLUMNS[name].meaning
            mistakes.append(Mistake(runs.path, name, f"{law.name} needs this column", f"Add it: {meaning}."))
        elif not np.isfinite(runs.columns[name]).all():
            places = [str(i + 1) for i in np.flatnonzero(~np.isfinite(runs.columns[name]))]
            rule = f"{name} is empty in run {', '.join(places[:5])}{' and more' if len(places) > 5 else ''}"
            mistakes.append(Mistake(runs.path, name, rule, "Fill it in, or remove these runs."))
        elif name != "loss" and np.ptp(runs.columns[name]) == 0:
            value = f"{runs.columns[name][0]:g}"
            rule = f"{name} is {value} in every run, so that nothing can be learned about it"
            remedy = f"Add runs that differ in it, or fit a law without {name}."
            mistakes.append(Mistake(runs.path, name, rule, remedy))
    wanted = len(law.parameters) + SPARE_RUNS
    if runs.count < wanted:
        rule = f"{law.name} has {len(law.parameters)} coefficients and needs {wanted} runs or more"
        mistakes.append(
            Mistake(runs.path, runs.count, rule, "Add runs, or fit a law with fewer coefficients.")
        )
    if mistakes:
        raise DataError(mistakes)
    return {name: runs.columns[name] for name in law.inputs}, runs.columns["loss"]


def fit_law(law: Law, runs: Runs, options: FitOptions | None = None) -> Fit:
    """Fits a law to runs.

    Args:
        law: The law.
        runs: The runs; ``sparsity`` is computed where possible.
        options: Options of the fit.

    Raises:
        DataError: The runs cannot be fitted; see `select`.
    """
    with one_thread():
        return _fit(law, runs, options or FitOptions())


def _fit(law: Law, runs: Runs, options: FitOptions) -> Fit:
    runs = Runs(runs.path, with_sparsity(runs.columns), runs.ignored)
    columns, losses = select(law, runs)
    objective = Objective.of(law, columns, losses, options.delta)
    theta_P, value, rivals_SP, agreeing = _best(objective, options)
    residuals_R, jacobian_RP = objective.row(theta_P)
    draws_BP = _bootstrap(objective, theta_P, options)
    intervals = _intervals(law, draws_BP, options.level) if len(draws_BP) else None
    held_out, note = _held_out(law, columns, losses, options) if options.hold_out else (None, "")
    values_P = _constrained(law, theta_P[None])[0]
    # Later reasons override earlier ones.
    undetermined = _wide(law, values_P, intervals) | _rivals(law, values_P, _constrained(law, rivals_SP))
    undetermined |= _null_directions(law, jacobian_RP) | _at_bounds(law, theta_P)
    return Fit(
        law=law,
        coefficients=dict(zip(law.names, (float(v) for v in values_P), strict=True)),
        intervals=intervals,
        draws=draws_BP,
        level=options.level,
        ranges={name: (float(array.min()), float(array.max())) for name, array in columns.items()},
        count=len(losses),
        rmse=float(np.sqrt(np.mean(residuals_R**2))),
        held_out_rmse=held_out,
        objective=value,
        agreeing_starts=agreeing,
        residuals=residuals_R,
        undetermined=undetermined,
        notes=tuple(text for text in (note,) if text),
    )


def _best(objective: Objective, options: FitOptions) -> tuple[Array, float, Array, float]:
    """Returns the best point, its objective, equally good points, and the share of starts that agree."""
    low_P, high_P = objective.law.start_box()
    sobol = qmc.Sobol(len(low_P), rng=np.random.default_rng(options.seed))
    starts_SP = low_P + (high_P - low_P) * sobol.random(options.starts)
    theta_SP, value_S = solve_many(objective, starts_SP)
    order = [int(i) for i in np.argsort(value_S, kind="stable") if np.isfinite(value_S[i])]
    assert order, f"no start of {objective.law.name} gave a finite objective"
    # The best, then the best of those that ended elsewhere.
    chosen = [order[0]]
    for i in order[1:]:
        if len(chosen) < options.finish and value_S[i] > value_S[chosen[-1]] * 1.01:
            chosen.append(i)
    found = [_lbfgs(objective, theta_SP[i]) for i in chosen]
    theta_P, value = min(found, key=lambda pair: pair[1])
    # At a noiseless optimum the objective is mere rounding error.
    agreeing = float(np.mean(value_S <= value * 1.01 + 1e-6))
    # For normal residuals, a likelihood ratio of about .05, whose doubled logarithm is 4.
    as_good_S = value_S <= value * (1 + 4 / len(objective.log_losses))
    return theta_P, value, theta_SP[as_good_S], agreeing


def _lbfgs(objective: Objective, theta_P: Array) -> tuple[Array, float]:
    """Minimises by L-BFGS in coordinates in which the runs inform equally about every direction.

    In a law's own coordinates a weight and its exponent nearly compensate, and L-BFGS is slow.
    """
    value = objective.value_and_gradient(theta_P)[0]
    for _ in range(2):
        turn_PP = _whitening(objective.row(theta_P)[1])
        origin_P = theta_P

        def whitened(z_P: Array, origin: Array = origin_P, turn: Array = turn_PP) -> tuple[float, Array]:
            found, gradient_P = objective.value_and_gradient(origin + turn @ z_P)
            return found, turn.T @ gradient_P

        options = {"maxiter": 300, "maxfun": 600, "ftol": 1e-13, "gtol": 1e-9}
        result = minimize(whitened, np.zeros_like(theta_P), jac=True, method="L-BFGS-B", options=options)
        if result.fun < value:
            theta_P, value = np.clip(origin_P + turn_PP @ result.x, *objective.law.box()), float(result.fun)
    return theta_P, value


def _whitening(jacobian_RP: Array) -> Array:
    scale_P = np.linalg.norm(jacobian_RP, axis=0)
    scale_P[scale_P == 0] = 1.0
    _, values_P, rows_PP = np.linalg.svd(jacobian_RP / scale_P, full_matrices=False)
    return np.asarray((rows_PP.T / np.maximum(values_P, values_P[0] * 1e-7)) / scale_P[:, None])


def _bootstrap(objective: Objective, theta_P: Array, options: FitOptions) -> Array:
    """Fits coefficients ``[B, P]`` to runs drawn with replacement, starting from the fit to all runs."""
    runs, draws = len(objective.log_losses), options.bootstrap
    if not draws:
        return np.empty((0, len(theta_P)))
    rng = np.random.default_rng([options.seed, 1])
    weights_BR = rng.multinomial(runs, np.full(runs, 1 / runs), size=draws).astype(np.float64)
    starts_BP = np.repeat(theta_P[None], draws, axis=0)
    found_BP, _ = solve_many(objective, starts_BP, weights_BR, near=True)
    return _constrained(objective.law, found_BP)


def _constrained(law: Law, theta_SP: Array) -> Array:
    return np.asarray(law.constrain(torch.from_numpy(theta_SP.copy())).numpy())


def _intervals(law: Law, draws_BP: Array, level: float) -> dict[str, tuple[float, float]]:
    tail = (1 - level) / 2
    low_P, high_P = np.quantile(draws_BP, [tail, 1 - tail], axis=0)
    return {name: (float(low_P[i]), float(high_P[i])) for i, name in enumerate(law.names)}


def _held_out(
    law: Law, columns: Mapping[str, Array], losses: Array, options: FitOptions
) -> tuple[float | None, str]:
    """Returns the error on the fifth of runs with lowest loss, fitted without them; or why it is missing."""
    count = max(1, round(HELD_OUT * len(losses)))
    order = np.argsort(losses, kind="stable")
    tested, kept = order[:count], order[count:]
    if len(kept) < len(law.parameters) + SPARE_RUNS:
        return None, "no held-out error: too few runs would remain"
    same = [name for name, array in columns.items() if np.ptp(array[kept]) == 0]
    if same:
        return None, f"no held-out error: {', '.join(same)} would not vary in the runs that remain"
    part = Objective.of(
        law, {name: array[kept] for name, array in columns.items()}, losses[kept], options.delta
    )
    theta_P = _best(part, options)[0]
    rest = Objective.of(
        law, {name: array[tested] for name, array in columns.items()}, losses[tested], options.delta
    )
    return float(np.sqrt(np.mean(rest.row(theta_P)[0] ** 2))), ""


def _null_directions(law: Law, jacobian_RP: Array) -> dict[str, str]:
    """Returns the parameters whose changes compensate each other on these runs, with the reason."""
    scale_P = np.linalg.norm(jacobian_RP, axis=0)
    found = {law.names[i]: "no run's loss depends on it" for i in np.flatnonzero(scale_P == 0)}
    scale_P[scale_P == 0] = 1.0
    _, values_P, rows_PP = np.linalg.svd(jacobian_RP / scale_P, full_matrices=False)
    for value, row_P in zip(values_P, rows_PP, strict=True):
        if value > _NULL * values_P[0]:
            continue
        together = [law.names[i] for i in np.flatnonzero(np.abs(row_P) > 0.1) if law.names[i] not in found]
        for name in together:
            others = ", ".join(other for other in together if other != name)
            found[name] = f"a change of {others or name} compensates any change of it on these runs"
    return found


def _at_bounds(law: Law, theta_P: Array) -> dict[str, str]:
    low_P, high_P = law.box()
    found = {}
    for i, name in enumerate(law.names):
        if theta_P[i] - low_P[i] < 0.5:
            found[name] = "it ran to its lower bound"
        elif high_P[i] - theta_P[i] < 0.5:
            found[name] = "it ran off without bound"
    return found


def _rivals(law: Law, values_P: Array, rivals_SP: Array) -> dict[str, str]:
    """Returns the parameters on which equally good fits disagree, with the reason."""
    found = {}
    for i, parameter in enumerate(law.parameters if len(rivals_SP) else ()):
        low, high = float(rivals_SP[:, i].min()), float(rivals_SP[:, i].max())
        bound = _bound(law, parameter, values_P)
        if high - low > abs(values_P[i]) if bound is None else high - bound > _APART * (low - bound):
            found[parameter.name] = f"equally good fits from other starts have {low:.3g} to {high:.3g}"
    return found


def _bound(law: Law, parameter: Parameter, values_P: Array) -> float | None:
    above = parameter.above
    return float(values_P[law.names.index(above)]) if isinstance(above, str) else above


def _wide(law: Law, values_P: Array, intervals: Mapping[str, tuple[float, float]] | None) -> dict[str, str]:
    """Returns the parameters whose interval is too wide to be informative, with the reason."""
    found = {}
    for i, parameter in enumerate(law.parameters if intervals is not None else ()):
        assert intervals is not None
        low, high = intervals[parameter.name]
        shown = f"{low:.3g} to {high:.3g}"
        bound = _bound(law, parameter, values_P)
        if bound is None:
            if low < 0 < high and high - low > abs(values_P[i]):
                found[parameter.name] = f"its interval, {shown}, leaves even the sign open"
        elif high - bound > _HUGE * max(low - bound, 1e-300):
            found[parameter.name] = f"its interval, {shown}, spans more than a factor of {_HUGE:g}"
    return found
