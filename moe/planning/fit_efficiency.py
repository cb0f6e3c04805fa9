"""Fit of the parameters in `moe.planning.assumptions.FITTED` to all published rows at once.

The fit minimises the sum over rows of a robust loss of ``log(predicted / published)`` tokens per second:
large errors count linearly instead of quadratically, so that one outlying model does not distort the others.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from moe.planning.assumptions import FITTED, Assumptions
from moe.planning.blocks import Blocks, Model, model_of
from moe.planning.layout import Job, Setting
from moe.planning.plan_layouts import Plan, make_plan, timed
from moe.planning.published import Row
from moe.planning.time import block_time, step_time

Point = NDArray[np.float64]

#: Bounds of each fitted parameter.
BOUNDS: Mapping[str, tuple[float, float]] = {
    "products_16": (0.2, 0.9),
    "products_8": (0.2, 0.9),
    "products_4": (0.2, 0.9),
    "power": (0.0, 2.0),
    "traffic": (1.0, 30.0),
    "casts": (0.0, 30.0),
    "launch_s": (0.0, 5e-3),
    "exchange_hidden": (0.0, 1.0),
}
# Size of errors from which they count less than their square.
_LARGE = 0.1
# Relative change of the parameters at which a fit stops.
_NEAR = 1e-4


@dataclass(frozen=True)
class Check:
    """Comparison of a published row with the model.

    Attributes:
        row: The row.
        plan: The model's prediction.
        left_out: Error after a fit to all other rows.
        family_out: Error after a fit to the rows of all other models.
    """

    row: Row
    plan: Plan
    left_out: float
    family_out: float

    @property
    def error(self) -> float:
        """Predicted over published tokens per second, minus 1."""
        return self.plan.tokens_per_gpu / self.row.tokens - 1


@dataclass(frozen=True)
class _Taken:
    """Model of a row as blocks, with its stages."""

    job: Job
    model: Model
    stages: Sequence[Blocks]


class Fit:
    """Fit to rows whose models are cut into stages only once, which makes the objective smooth."""

    def __init__(self, rows: Sequence[Row], base: Assumptions) -> None:
        self.rows = tuple(rows)
        self.base = base
        models: dict[tuple[str, int], Model] = {}
        self._taken: dict[int, _Taken] = {}
        for row in rows:
            key, job = (row.model, row.seq_len), row.job
            models[key] = models.get(key) or model_of(job.shape, job.seq_len)
            setting = Setting(row.layout, job, row.cluster, base)
            self._taken[id(row)] = _Taken(job, models[key], timed(setting, row.sizes, models[key])[0])

    def plan(self, row: Row) -> Plan:
        """Returns the model's prediction for a row."""
        taken = self._taken[id(row)]
        return make_plan(row.layout, taken.job, row.cluster, self.base, row.sizes, taken.model)

    def error(self, row: Row, assumed: Assumptions) -> float:
        """Returns predicted over published tokens per second, minus 1, with the stages of the base."""
        taken = self._taken[id(row)]
        setting = Setting(row.layout, taken.job, row.cluster, assumed)
        times = {id(block): block_time(block, setting) for block in taken.model.kinds}
        seconds = step_time(taken.stages, times, setting, row.sizes).total
        return row.global_batch * row.seq_len / seconds / row.gpus / row.tokens - 1

    def fit(self, rows: Sequence[Row]) -> Assumptions:
        """Returns the parameters that fit these rows best."""
        low, high = (np.array([BOUNDS[name][side] for name in FITTED]) for side in (0, 1))

        def assumed(x: Point) -> Assumptions:
            values = dict(zip(FITTED, (low + x * (high - low)).tolist(), strict=True))
            return replace(self.base, **values)

        def residuals(x: Point) -> list[float]:
            at = assumed(x)
            return [math.log1p(self.error(row, at)) for row in rows]

        start = np.array([getattr(self.base, name) for name in FITTED])
        start = np.clip((start - low) / (high - low), 0.01, 0.99)
        found = least_squares(residuals, start, bounds=(0, 1), loss="soft_l1", f_scale=_LARGE, xtol=_NEAR)
        return assumed(found.x)

    def check(self, log: Callable[[str], None] = lambda line: None) -> list[Check]:
        """Checks every row under the present parameters, and after fits without it and without its model.

        Args:
            log: Receives lines on progress.
        """
        families: dict[str, Assumptions] = {}
        done = []
        for number, row in enumerate(self.rows):
            family = row.model.partition(" ")[0]
            if family not in families:
                others = [other for other in self.rows if not other.model.startswith(family)]
                families[family] = self.fit(others)
            alone = self.fit([other for other in self.rows if other is not row])
            errors = self.error(row, alone), self.error(row, families[family])
            done.append(Check(row, self.plan(row), *errors))
            log(f"{number + 1} of {len(self.rows)} rows")
        return done


def refit(rows: Sequence[Row], base: Assumptions, rounds: int = 3) -> Assumptions:
    """Fits to all rows repeatedly, each time with the stages that follow from the previous fit."""
    for _ in range(rounds):
        base = Fit(rows, base).fit(rows)
    return base


def spread(errors: Sequence[float]) -> dict[str, float]:
    """Returns median, mean and worst size of errors."""
    sizes = [abs(error) for error in errors]
    return {"median": statistics.median(sizes), "mean": statistics.fmean(sizes), "worst": max(sizes)}
