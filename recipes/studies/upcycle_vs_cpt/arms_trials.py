"""Trials of the grid over dense lengths, arms and seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe.errors import ConfigError
from recipes.jobs.sweep import SweptRun
from recipes.jobs.upcycle_vs_cpt_job import arm_models
from recipes.runtime.atomic import atomic_write_json
from recipes.studies.option_lists import trial_options

LENGTH = "{length}"
Arms = Literal["continued", "scratch"]
_PLAN = "plan.json"


@dataclass(frozen=True, kw_only=True)
class ArmsTrial(SweptRun):
    """One run of the grid.

    Attributes:
        arms: ``continued`` (upcycled, and dense continued) or ``scratch``, which no dense length changes.
        lengths: Steps of the dense model before. One for ``continued``; for ``scratch`` all of the grid,
            because that run is given the FLOPs of each length on top in turn.
        seed: Seed of the weights that are drawn.
    """

    arms: Arms
    lengths: tuple[int, ...]
    seed: int


def plan_trials(
    folder: Path, lengths: Sequence[int], seeds: int, options: Sequence[str] = ()
) -> list[ArmsTrial]:
    """Plans the trials seed by seed, so that a grid cut short covers every length and arm alike.

    Other lengths need another run from scratch, because the longest one decays elsewhere.

    Args:
        folder: Folder of the grid.
        lengths: Steps of the dense models, ascending.
        seeds: Number of seeds.
        options: Options of all runs, with `LENGTH` for the steps of the dense model.
    """
    arms: list[tuple[Arms, tuple[int, ...]]] = [("continued", (length,)) for length in lengths]
    arms.append(("scratch", tuple(lengths)))
    return [_trial(folder / "runs", *one, seed, options) for seed in range(seeds) for one in arms]


def _trial(runs: Path, arms: Arms, lengths: tuple[int, ...], seed: int, options: Sequence[str]) -> ArmsTrial:
    own = (
        f"upcycle_vs_cpt.arms={arms}",
        f"upcycle_vs_cpt.sunk_steps={list(lengths)}".replace(" ", ""),
        f"seed={seed}",
        f"model.seed={seed}",
        # A run from scratch trains no dense model.
        f"model.steps={lengths[-1] if arms == 'continued' else 0}",
    )
    given = [text.replace(LENGTH, str(lengths[-1])) for text in options]
    kind = "d" if arms == "continued" else "scratch-"
    place = runs / f"{kind}{'-'.join(map(str, lengths))}-s{seed}"
    return ArmsTrial(
        folder=place,
        overrides=trial_options("upcycle_vs_cpt", given, own, place),
        swept=own,
        models=arm_models(arms, (0, *lengths)),
        arms=arms,
        lengths=lengths,
        seed=seed,
    )


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
