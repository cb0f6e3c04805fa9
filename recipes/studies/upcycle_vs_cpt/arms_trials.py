"""Trials of the grid over dense lengths, arms and seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from moe.errors import ConfigError
from recipes.runtime.atomic import atomic_write_json
from recipes.studies.sweep import Trial

LENGTH = "{length}"
_PLAN = "plan.json"


@dataclass(frozen=True, kw_only=True)
class ArmsTrial(Trial):
    """One run of the grid.

    Attributes:
        arms: ``continued`` (upcycled, and dense continued) or ``scratch``, which no dense length changes.
        lengths: Steps of the dense model before. One for ``continued``; for ``scratch`` all of the grid,
            because that run is given the FLOPs of each length on top in turn.
    """

    recipe: ClassVar[str] = "upcycle_vs_cpt"
    arms: Literal["continued", "scratch"]
    lengths: tuple[int, ...]

    @property
    def stages(self) -> tuple[str, ...]:
        """Models in the summary of a finished run."""
        if self.arms == "continued":
            return ("moe", "cpt", "cpt_tokens")
        return ("scratch", *(f"scratch_{steps}" for steps in (0, *self.lengths[:-1])))

    @property
    def own(self) -> list[str]:
        """Overrides that distinguish this trial from the others."""
        return [
            f"upcycle_vs_cpt.arms={self.arms}",
            f"upcycle_vs_cpt.sunk_steps={list(self.lengths)}".replace(" ", ""),
            f"seed={self.seed}",
            f"model.seed={self.seed}",
            # A run from scratch trains no dense model.
            f"model.steps={self.lengths[-1] if self.arms == 'continued' else 0}",
        ]

    def arguments(self, overrides: Sequence[str]) -> list[str]:
        """Returns the command line of ``train.py``, with the dense length in place of `LENGTH`."""
        return super().arguments([text.replace(LENGTH, str(self.lengths[-1])) for text in overrides])


def plan_trials(folder: Path, lengths: Sequence[int], seeds: int) -> list[ArmsTrial]:
    """Plans the trials seed by seed, so that a grid cut short covers every length and arm alike.

    Other lengths need another run from scratch, because the longest one decays elsewhere.

    Args:
        folder: Folder of the grid.
        lengths: Steps of the dense models, ascending.
        seeds: Number of seeds.
    """
    runs, every = folder / "runs", "-".join(str(length) for length in lengths)
    trials = []
    for seed in range(seeds):
        each = [((length,), f"d{length}-s{seed}") for length in lengths]
        trials += [
            ArmsTrial(arms="continued", lengths=one, seed=seed, folder=runs / name) for one, name in each
        ]
        scratch = runs / f"scratch-{every}-s{seed}"
        trials.append(ArmsTrial(arms="scratch", lengths=tuple(lengths), seed=seed, folder=scratch))
    return trials


def keep_options(folder: Path, overrides: Sequence[str]) -> None:
    """Writes the options that all runs of a grid share; lengths and seeds may be added later.

    Raises:
        ConfigError: The folder holds runs with other options, which do not compare.
    """
    began, wanted = options_of(folder), sorted(overrides)
    if began is not None and began != wanted:
        rule = f"the runs in {folder} began with {began or 'no options'}"
        raise ConfigError.one("options", wanted, rule, "Give these to go on, or another --name.")
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_json(folder / _PLAN, {"options": wanted})


def options_of(folder: Path) -> list[str] | None:
    """Reads the options of the runs in a folder; None where there are none."""
    path = folder / _PLAN
    if not path.is_file():
        return None
    options: list[str] = json.loads(path.read_text(encoding="utf-8"))["options"]
    return options
