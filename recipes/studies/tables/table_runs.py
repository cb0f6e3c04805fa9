"""Runs of a comparison: first all learning rates on one seed, then the other seeds at the best rate.

A finished run leaves a file and is not repeated; a failed run leaves its traceback and is repeated.
"""

from __future__ import annotations

import dataclasses
import json
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.errors import DataError, DiskError, Mistake
from recipes.runtime.atomic import atomic_write_json, atomic_write_text
from recipes.runtime.user_json import read_json_object
from recipes.studies.tables.generate import Rows, TableConfig
from recipes.studies.tables.table_model import ModelConfig, TableMoE
from recipes.studies.tables.train_table import FitConfig, train_run

Train = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Experiment:
    """Settings of all runs, and the routers to compare.

    Attributes:
        folder: Folder of the runs.
        table: The generated set.
        model: Widths of the model.
        fit: Budget of a run.
        moes: Routers with their layers, by spec.
        seeds: Seeds 0 ... of initial weights, order of rows and dropout; the set stays the same.
        lrs: The learning rates tried on seed 0; the one that validates best is every seed's.
    """

    folder: Path
    table: TableConfig
    model: ModelConfig
    fit: FitConfig
    moes: Mapping[str, TableMoE]
    seeds: int
    lrs: tuple[float, ...]

    def settings(self, spec: str) -> dict[str, Any]:
        """Returns the settings of a spec as JSON, except seed and learning rate."""
        values = {
            "table": dataclasses.asdict(self.table),
            "model": dataclasses.asdict(self.model),
            "fit": dataclasses.asdict(self.fit),
            "mixture": dataclasses.asdict(self.moes[spec]),
        }
        # Same as read back, with tuples as lists.
        plain: dict[str, Any] = json.loads(json.dumps(values))
        return plain


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        experiment: Experiment of the run.
        spec: Router with its options.
        seed: Seed of weights, order and dropout.
        lr: Adam's learning rate.
    """

    experiment: Experiment
    spec: str
    seed: int
    lr: float

    @property
    def path(self) -> Path:
        """File of the result."""
        plain = re.sub(r"[^A-Za-z0-9_.=-]+", "-", self.spec)
        return self.experiment.folder / "runs" / f"{plain}-s{self.seed}-lr{self.lr:g}.json"

    @property
    def error_path(self) -> Path:
        """File of the traceback of the last attempt, if it failed."""
        return self.path.with_suffix(".error.txt")

    def result(self) -> dict[str, Any] | None:
        """Reads the result of the run; None when it has not ended.

        Raises:
            DataError: The file is damaged, or of a run under other settings.
        """
        if not self.path.is_file():
            return None
        try:
            content = read_json_object(self.path)
            settings: dict[str, Any] = content["settings"]
            result: dict[str, Any] = content["result"]
        except (ValueError, KeyError, TypeError):
            rule = "it is not the file of a run"
            raise DataError.one(str(self.path), "...", rule, "Delete it; the run is repeated.") from None
        differing = _differences(settings, self.experiment.settings(self.spec))
        if differing:
            rule = f"this run was done under another {', '.join(differing)}"
            raise DataError.one(str(self.path), "...", rule, "Choose another --name, or delete the folder.")
        return result

    def execute(self, splits: dict[str, Rows], train: Train = train_run) -> str | None:
        """Trains and writes the result, or the traceback; returns the first line of the error, if any."""
        shared = self.experiment
        moe = shared.moes[self.spec]
        try:
            result = train(splits, shared.table, shared.model, moe, shared.fit, self.seed, self.lr)
        except DiskError:
            raise
        except Exception as error:
            atomic_write_text(self.error_path, traceback.format_exc())
            return f"{type(error).__name__}: {error}".splitlines()[0]
        atomic_write_json(self.path, {"settings": shared.settings(self.spec), "result": result})
        self.error_path.unlink(missing_ok=True)
        return None


def _differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Returns the paths of values that differ, or exist on one side only."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return [] if one == other else [path]
    return [
        found
        for key in dict.fromkeys([*one, *other])
        for found in _differences(one.get(key), other.get(key), f"{path}.{key}" if path else key)
    ]


def tuning_runs(experiment: Experiment) -> list[Run]:
    """Returns every spec at every learning rate, on seed 0."""
    return [Run(experiment, spec, 0, lr) for lr in experiment.lrs for spec in experiment.moes]


def final_runs(experiment: Experiment, spec: str) -> list[Run]:
    """Returns all seeds of a spec at the best learning rate on validation; none while a rate is missing."""
    tuned = [(run, run.result()) for run in tuning_runs(experiment) if run.spec == spec]
    if any(result is None for _, result in tuned):
        return []
    best, _ = max(tuned, key=lambda pair: sum(pair[1]["validation_auc"]) if pair[1] else 0.0)
    return [Run(experiment, spec, seed, best.lr) for seed in range(experiment.seeds)]


def seed_by_seed(experiment: Experiment) -> list[Run]:
    """Returns the final runs by seed, so that a comparison cut short covers every spec alike."""
    runs = [run for spec in experiment.moes for run in final_runs(experiment, spec)]
    return sorted(runs, key=lambda run: run.seed)


def check_kept(experiment: Experiment) -> None:
    """Reads the files of earlier runs before anything is trained.

    Raises:
        DataError: Files are damaged or have other settings; all of them at once.
    """
    mistakes: list[Mistake] = []
    for spec in experiment.moes:
        for seed in range(experiment.seeds):
            for lr in experiment.lrs:
                try:
                    Run(experiment, spec, seed, lr).result()
                except DataError as error:
                    mistakes += error.mistakes
    if mistakes:
        raise DataError(mistakes)


def execute_missing(
    runs: Sequence[Run], splits: dict[str, Rows], log: Callable[[str], None], train: Train = train_run
) -> int:
    """Executes the runs that are not done; a failed one stops no other.

    Returns:
        How many failed.
    """
    failed = 0
    for number, run in enumerate(runs, start=1):
        if run.result() is not None:
            continue
        error = run.execute(splits, train)
        name = f"{number}/{len(runs)} {run.spec} seed {run.seed} lr {run.lr:g}"
        if error is not None:
            failed += 1
            log(f"{name}: FAILED, {error}; see {run.error_path}")
            continue
        result = run.result()
        assert result is not None, run.path
        aucs = ", ".join(f"{value:.4f}" for value in result["validation_auc"])
        log(f"{name}: validation AUC {aucs} ({result['seconds']:.0f} s)")
    return failed
