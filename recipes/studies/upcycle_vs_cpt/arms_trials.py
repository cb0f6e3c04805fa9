"""The runs of the grid: which there are, which are done, and what each is told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moe.errors import ConfigError, Mistake
from recipes.runtime.atomic import atomic_write_json
from recipes.tracking.metrics_log import METRICS_FILE

LENGTH = "{length}"
_PLAN = "plan.json"


@dataclass(frozen=True)
class Trial:
    """One run of the grid.

    Attributes:
        arms: ``continued`` (upcycled, and dense trained on) or ``scratch``, which no dense length changes.
        lengths: Steps of the dense model before: one, or for a run from scratch all of the grid, whose FLOPs
            it gets on top in turn.
        seed: Of all weights that are drawn; data, their order and the validation set are those of seed 0.
        folder: The run directory.
    """

    arms: Literal["continued", "scratch"]
    lengths: tuple[int, ...]
    seed: int
    folder: Path

    @property
    def done(self) -> bool:
        """Whether every leg of the run came to its end."""
        return {row["model"] for row in self.summary().get("results", [])}.issuperset(self.stages)

    @property
    def stages(self) -> tuple[str, ...]:
        """Rows of the summary that it ends with."""
        if self.arms == "continued":
            return ("moe", "cpt", "cpt_tokens")
        return ("scratch", *(f"scratch_{steps}" for steps in (0, *self.lengths[:-1])))

    @property
    def prepared(self) -> bool:
        """Whether it trains: tokenizer and tokens are in the cache."""
        return (self.folder / METRICS_FILE).is_file()

    @property
    def log(self) -> Path:
        """Everything that the run printed."""
        return self.folder.with_suffix(".log")

    def summary(self) -> dict[str, Any]:
        """The run's ``summary.json``; empty where there is none yet."""
        path = self.folder / "summary.json"
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return content

    def arguments(self, overrides: Sequence[str]) -> list[str]:
        """What train.py is given. Overrides of the user come before, so that the trial's own win."""
        own = [
            f"upcycle_vs_cpt.arms={self.arms}",
            f"upcycle_vs_cpt.sunk_steps={list(self.lengths)}".replace(" ", ""),
            f"seed={self.seed}",
            f"model.seed={self.seed}",
            "data.seed=0",
            # A run from scratch trains no dense model.
            f"model.steps={self.lengths[-1] if self.arms == 'continued' else 0}",
            "tracker.mode=disabled",
            f"output_dir={self.folder.parent}",
            f"run.name={self.folder.name}",
            "resume=auto",
        ]
        given = [override.replace(LENGTH, str(self.lengths[-1])) for override in overrides]
        return ["+recipe=upcycle_vs_cpt", *given, *own]


def plan_trials(folder: Path, lengths: Sequence[int], seeds: int) -> list[Trial]:
    """Seed by seed, so that a grid that is cut short holds every length and arm alike; lengths ascend.

    Other lengths need another run from scratch: the longest one decays elsewhere.
    """
    runs = folder / "runs"
    every = "-".join(str(length) for length in lengths)
    trials = []
    for seed in range(seeds):
        trials += [Trial("continued", (length,), seed, runs / f"d{length}-s{seed}") for length in lengths]
        trials.append(Trial("scratch", tuple(lengths), seed, runs / f"scratch-{every}-s{seed}"))
    return trials


def keep_options(folder: Path, overrides: Sequence[str]) -> None:
    """Writes down what all runs of a grid are told; lengths and seeds may be added later.

    Raises:
        ConfigError: The folder holds runs that were told something else: they do not compare.
    """
    path = folder / _PLAN
    wanted = sorted(overrides)
    if path.is_file():
        began = json.loads(path.read_text(encoding="utf-8"))["options"]
        if began != wanted:
            rule = f"the runs in {folder} began with {began or 'no options'}"
            remedy = "Give these to go on, or another --name."
            raise ConfigError([Mistake("options", wanted, rule, remedy)])
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_json(path, {"options": wanted})


def options_of(folder: Path) -> list[str] | None:
    """What the runs in a folder were told; None where there are none."""
    path = folder / _PLAN
    if not path.is_file():
        return None
    options: list[str] = json.loads(path.read_text(encoding="utf-8"))["options"]
    return options
