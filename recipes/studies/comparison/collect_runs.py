"""Collects the runs of a comparison by router: means and spread over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.runtime.run_file import METRICS_FILE
from recipes.studies.comparison.router_trials import RouterTrial
from recipes.studies.study_page import Spread, spread
from recipes.tracking.metrics_log import read_rows

# Routing figures are means over the last part of the steps: the first ones are still settling.
_LAST_SHARE = 0.1


@dataclass(frozen=True)
class RouterResult:
    """One router's row.

    Attributes:
        router: A choice of ``conf/router``.
        seeds: Number of finished trials.
        failed: Number of the other trials.
        val_loss: Validation loss at the end.
        figures: Figures by name: ``maxvio``, ``load_cv``, ``dead_experts``, ``dropped_fraction``, ``step_s``,
            and the router's own where it reports them.
        active_params: Parameters that a token uses, at the router's nominal number of experts.
    """

    router: str
    seeds: int
    failed: int
    val_loss: Spread | None
    figures: Mapping[str, Spread]
    active_params: int | None


def collect(trials: Sequence[RouterTrial]) -> list[RouterResult]:
    """Returns a row for every router, the best validation loss first, those without a run last."""
    results = []
    for router in dict.fromkeys(trial.router for trial in trials):
        own = [trial for trial in trials if trial.router == router]
        done = [trial for trial in own if trial.done]
        rows, figures = [trial.result() for trial in done], [_figures(trial) for trial in done]
        names = sorted({name for found in figures for name in found})
        results.append(
            RouterResult(
                router=router,
                seeds=len(done),
                failed=len(own) - len(done),
                val_loss=spread([row["val_loss"] for row in rows]) if rows else None,
                figures={n: spread([found[n] for found in figures if n in found]) for n in names},
                active_params=rows[0].get("active_params") if rows else None,
            )
        )
    return sorted(results, key=lambda r: (r.val_loss is None, r.val_loss.mean if r.val_loss else 0.0))


def _figures(trial: RouterTrial) -> dict[str, float]:
    rows = [r for r in read_rows(trial.folder / METRICS_FILE) if r["stage"] == "moe" and "loss" in r]
    tail: list[dict[str, Any]] = rows[-max(1, round(_LAST_SHARE * len(rows))) :]
    names = [name for name in tail[-1] if name.startswith("router/")] if tail else []
    found = {
        name.removeprefix("router/"): statistics.fmean(row[name] for row in tail if name in row)
        for name in names
    }
    if rows:
        found["step_s"] = statistics.median(row["step_s"] for row in rows)
    return found
