"""Reads back what a run has left in its directory, however far it came.

Letters: S logged steps, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe.errors import DataError
from recipes.runtime.run_file import LOAD_FILE, METRICS_FILE
from recipes.runtime.user_json import read_json_object
from recipes.tracking.metrics_log import read_rows
from recipes.tracking.report.formats import number

CONFIG_FILE = "config.yaml"
SUMMARY_FILE = "summary.json"
Row = Mapping[str, Any]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LayerLoad:
    """The load of one MoE layer over a run.

    Attributes:
        layer: Index of the layer in the model.
        steps_S: Steps at which load was logged, ascending.
        load_SE: Share of the routed slots of each expert.
    """

    layer: int
    steps_S: Floats
    load_SE: Floats


@dataclass(frozen=True)
class RunRecord:
    """Content of a run directory.

    Attributes:
        run_dir: The directory.
        stages: Stage -> its rows, in the order of training.
        loads: Loads of the MoE layers in the stage ``moe``.
        summary: Content of ``summary.json``; empty where the run has not finished.
        config: Text of ``config.yaml``; None when missing.
    """

    run_dir: Path
    stages: Mapping[str, Sequence[Row]]
    loads: Sequence[LayerLoad]
    summary: Mapping[str, Any]
    config: str | None

    def section(self, name: str) -> Mapping[str, Any]:
        """Returns a section of the summary, empty where it is missing."""
        return section(self.summary, name)


def section(summary: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Returns ``summary[name]`` if it is a mapping, else an empty one."""
    value = summary.get(name)
    return value if isinstance(value, Mapping) else {}


def read_run(run_dir: str | Path) -> RunRecord:
    """Reads a run directory, finished or not.

    Raises:
        DataError: It is not there, holds nothing to report, or a file in it is damaged.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        remedy = "Give the run directory, such as outputs/my-run."
        raise DataError.one("run directory", str(run_dir), "is not a folder", remedy)
    stages: dict[str, list[Row]] = {}
    for row in read_rows(run_dir / METRICS_FILE):
        stages.setdefault(str(row.get("stage", "moe")), []).append(row)
    summary = _read_summary(run_dir / SUMMARY_FILE)
    if not stages and not summary:
        rule = f"holds neither {METRICS_FILE} with a row nor {SUMMARY_FILE}"
        raise DataError.one(
            "run directory", str(run_dir), rule, "Give the directory of a run that has trained."
        )
    config = run_dir / CONFIG_FILE
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else None
    return RunRecord(run_dir, stages, _read_loads(run_dir / LOAD_FILE), summary, text)


def series(rows: Sequence[Row], name: str) -> tuple[Floats, Floats]:
    """Returns a figure over tokens: ``[S]`` tokens and ``[S]`` values of the rows with both, by tokens.

    A row of step 0 has trained on no tokens, even if it lacks the number.
    """
    points: dict[float, float] = {}
    for row in rows:
        value = number(row.get(name))
        tokens = number(row.get("tokens", 0 if row.get("step") == 0 else None))
        if value is not None and tokens is not None:
            points[tokens] = value
    ordered = sorted(points.items())
    return np.array([x for x, _ in ordered]), np.array([y for _, y in ordered])


def last(rows: Sequence[Row], name: str) -> float | None:
    """Returns the last known value of a figure."""
    _, values = series(rows, name)
    return float(values[-1]) if values.size else None


def _read_summary(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        return read_json_object(path)
    except (OSError, ValueError) as error:
        remedy = "Remove it to report what metrics.jsonl has."
        raise DataError.one(str(path), str(error), "is not JSON that a run writes", remedy) from error


def _read_loads(path: Path) -> list[LayerLoad]:
    """Reads the load of the layers, step by step; the last row of a step counts."""
    layers: dict[int, dict[int, Floats]] = {}
    for row in read_rows(path):
        if row.get("stage", "moe") != "moe" or not isinstance(row.get("step"), int):
            continue
        try:
            for layer, load in zip(row.get("layers") or (), row.get("load") or (), strict=False):
                load_E = np.array(load, dtype=np.float64).reshape(-1)
                layers.setdefault(int(layer), {})[row["step"]] = load_E
        except (TypeError, ValueError, OverflowError):
            remedy = "Restore it, or remove that row."
            raise DataError.one(
                str(path), f"step {row['step']}", "holds no loads of layers", remedy
            ) from None
    return [_stack(layer, steps) for layer, steps in sorted(layers.items())]


def _stack(layer: int, steps: Mapping[int, Floats]) -> LayerLoad:
    experts = steps[max(steps)].size
    kept = sorted(step for step, load_E in steps.items() if load_E.size == experts)
    return LayerLoad(layer, np.array(kept, dtype=np.float64), np.stack([steps[step] for step in kept]))
