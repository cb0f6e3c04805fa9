"""Trials of a comparison of routers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.jobs.sweep import SweptRun
from recipes.studies.option_lists import trial_options


@dataclass(frozen=True, kw_only=True)
class RouterTrial(SweptRun):
    """One run of a comparison.

    Attributes:
        router: A choice of ``conf/router``.
        seed: Seed of the weights that are drawn.
    """

    router: str
    seed: int

    def result(self) -> dict[str, Any]:
        """Returns the row of the upcycled model in the summary of a finished run."""
        return next(row for row in self.summary()["results"] if row["model"] == "moe")


def plan_trials(
    folder: Path, routers: Sequence[str], seeds: int, options: Sequence[str] = ()
) -> list[RouterTrial]:
    """Plans the trials seed by seed, so that a comparison cut short covers every router alike.

    Args:
        folder: Folder of the comparison.
        routers: Choices of ``conf/router``.
        seeds: Number of seeds.
        options: Options of all runs.
    """
    return [
        _trial(folder / "runs" / f"{r}-s{seed}", r, seed, options) for seed in range(seeds) for r in routers
    ]


def _trial(folder: Path, router: str, seed: int, options: Sequence[str]) -> RouterTrial:
    own = (f"router={router}", f"seed={seed}")
    line = trial_options("upcycle", options, (*own, "compare.cpt=false"), folder)
    return RouterTrial(folder=folder, overrides=line, swept=own, models=("moe",), router=router, seed=seed)
