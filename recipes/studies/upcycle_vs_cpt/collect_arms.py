"""Collects the runs of the grid: losses at equal tokens and at equal FLOPs, and the curves on the way.

Every loss compared is taken at the end of a run, whose learning rate has decayed; none is interpolated.
Letters: D is the dense model's FLOPs of training on a token, S the tokens that it was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.runtime.run_file import METRICS_FILE
from recipes.studies.study_page import Spread, spread
from recipes.studies.upcycle_vs_cpt.arms_trials import ArmsTrial
from recipes.tracking.metrics_log import read_rows


@dataclass(frozen=True)
class Reading:
    """Model at the end of a run of its own.

    Attributes:
        loss: Validation loss, nats per token.
        tokens: Tokens trained on in this run.
        flops: FLOPs of this run, without the dense model's own.
    """

    loss: float
    tokens: int
    flops: float


@dataclass(frozen=True)
class Curve:
    """Validation losses along one run.

    Attributes:
        tokens: Tokens trained on, ascending.
        losses: Losses in nats per token.
        flops_per_token: FLOPs of training on a token.
        constant: Tokens up to which the learning rate is constant; it decays from there to the end.
    """

    tokens: tuple[int, ...]
    losses: tuple[float, ...]
    flops_per_token: float
    constant: float


# Name of a reading -> its label, and the arm whose loss it is.
READINGS: Mapping[str, tuple[str, str]] = {
    "dense": ("dense, as it was", "dense"),
    "cpt_tokens": ("dense continued, equal tokens", "cpt"),
    "cpt_flops": ("dense continued, equal FLOPs", "cpt"),
    "moe": ("upcycled", "moe"),
    "scratch_free": ("MoE from scratch, dense not counted", "scratch"),
    "scratch_total": ("MoE from scratch, dense counted", "scratch"),
}


@dataclass(frozen=True)
class Cell:
    """One dense length under one seed.

    Attributes:
        length: Steps of the dense model.
        seed: Seed of the weights.
        readings: Readings by name in `READINGS`; those from scratch only where that run exists.
        curves: Curves by stage: the longest run of an arm, and the runs that branch off from it.
        dense_tokens: S.
        sunk_flops: FLOPs of the dense model's own training, S D.
        serving: Costs of decode steps of ``dense`` and ``moe``, see `recipes.jobs.arm_costs`; None where the
            family is unknown.
        sizes: Columns of ``docs/scaling_laws.md`` that describe the models.
    """

    length: int
    seed: int
    readings: Mapping[str, Reading]
    curves: Mapping[str, Curve]
    dense_tokens: int
    sunk_flops: float
    serving: Mapping[str, list[dict[str, Any]] | None]
    sizes: Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """Results of the grid.

    Attributes:
        cells: Finished cells, by length and seed.
        missing: Names of runs that have not finished.
    """

    cells: tuple[Cell, ...]
    missing: tuple[str, ...]

    @property
    def lengths(self) -> list[int]:
        """Dense lengths with a cell, ascending."""
        return sorted({cell.length for cell in self.cells})

    def of(self, length: int) -> list[Cell]:
        """Returns the cells of a length."""
        return [cell for cell in self.cells if cell.length == length]

    def loss(self, length: int, name: str) -> Spread | None:
        """Returns a reading over seeds."""
        losses = [cell.readings[name].loss for cell in self.of(length) if name in cell.readings]
        return spread(losses) if losses else None

    def behind(self, length: int, name: str) -> Spread | None:
        """Returns the distance of a reading above the upcycled model's, seed by seed."""
        both = [cell.readings for cell in self.of(length) if name in cell.readings]
        return spread([found[name].loss - found["moe"].loss for found in both]) if both else None

    def reading(self, length: int, name: str) -> Reading | None:
        """Returns the reading of the first seed that has it; tokens and FLOPs are the same for all."""
        return next((cell.readings[name] for cell in self.of(length) if name in cell.readings), None)


def collect(trials: Sequence[ArmsTrial]) -> Found:
    """Reads the finished runs."""
    done = [trial for trial in trials if trial.done]
    scratch = {trial.seed: trial for trial in done if trial.arms == "scratch"}
    cells = [_cell(trial, scratch.get(trial.seed)) for trial in done if trial.arms == "continued"]
    ordered = sorted(cells, key=lambda cell: (cell.length, cell.seed))
    return Found(tuple(ordered), tuple(t.folder.name for t in trials if not t.done))


def _cell(trial: ArmsTrial, scratch: ArmsTrial | None) -> Cell:
    summary, length = trial.summary(), trial.lengths[-1]
    rows = {row["model"]: row for row in summary["results"]}
    stages = {"dense": "dense", "cpt_tokens": "cpt_tokens", "cpt_flops": "cpt", "moe": "moe"}
    curves = {stage: _curve(trial, rows[stage]) for stage in trial.models}
    if scratch is not None:
        rows |= {row["model"]: row for row in scratch.summary()["results"]}
        total = "scratch" if length == scratch.lengths[-1] else f"scratch_{length}"
        stages |= {"scratch_free": "scratch_0", "scratch_total": total}
        curves |= {stage: _curve(scratch, rows[stage]) for stage in scratch.models}
    dense_tokens = length * int(summary["tokens_per_step"])
    sizes = {
        "params": rows["moe"]["total_params"],
        "active_params": rows["moe"]["active_params"],
        "dense_params": rows["dense"]["total_params"],
        **summary["moe"],
    }
    return Cell(
        length=length,
        seed=trial.seed,
        readings={name: _reading(rows[stage]) for name, stage in stages.items()},
        curves=curves,
        dense_tokens=dense_tokens,
        sunk_flops=dense_tokens * rows["dense"]["flops_per_token_train"],
        serving=summary["serving"],
        sizes=sizes,
    )


def _reading(row: Mapping[str, Any]) -> Reading:
    return Reading(row["val_loss"], row["tokens"], row["tokens"] * row["flops_per_token_train"])


def _curve(trial: ArmsTrial, row: Mapping[str, Any]) -> Curve:
    logged = [line for line in read_rows(trial.folder / METRICS_FILE) if line["stage"] == row["model"]]
    points = {line["tokens"]: line["val_loss"] for line in logged if "val_loss" in line}
    rates = [(line["tokens"], line["lr"]) for line in logged if "lr" in line]
    peak = max((lr for _, lr in rates), default=0.0)
    constant = max((tokens for tokens, lr in rates if lr == peak), default=0)
    ordered = sorted(points.items())
    return Curve(
        tuple(tokens for tokens, _ in ordered),
        tuple(loss for _, loss in ordered),
        row["flops_per_token_train"],
        constant,
    )
