"""Trials of a comparison of routers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from recipes.studies.sweep import Trial


@dataclass(frozen=True, kw_only=True)
class RouterTrial(Trial):
    """One run of a comparison.

    Attributes:
        router: A choice of ``conf/router``.
    """

    recipe: ClassVar[str] = "upcycle"
    router: str

    @property
    def own(self) -> list[str]:
        """Overrides that distinguish this trial from the others."""
        return [f"router={self.router}", f"seed={self.seed}", "compare.cpt=false"]

    def result(self) -> dict[str, Any]:
        """Returns the row of the upcycled model in the summary of a finished run."""
        return next(row for row in self.summary()["results"] if row["model"] == "moe")


def plan_trials(folder: Path, routers: Sequence[str], seeds: int) -> list[RouterTrial]:
    """Plans the trials seed by seed, so that a comparison cut short covers every router alike."""
    runs = folder / "runs"
    return [
        RouterTrial(router=router, seed=seed, folder=runs / f"{router}-s{seed}")
        for seed in range(seeds)
        for router in routers
    ]
