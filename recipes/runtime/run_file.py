"""``run.json``: record of a run that it needs to resume."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe.errors import CheckpointError
from recipes.runtime.atomic import atomic_write_json
from recipes.runtime.user_json import read_json_object

#: Rows of a run, one a step, and the load of every expert; `recipes.tracking.metrics_log` writes them.
METRICS_FILE, LOAD_FILE = "metrics.jsonl", "load.jsonl"
_FILE = "run.json"
_TYPES: dict[str, type | tuple[type, ...]] = {
    "identity": dict,
    "budgets": dict,
    "launch": dict,
    "parts": list,
    "started": (int, float),
    "run_id": str,
    "fork": str,
    "wandb_run_id": str,
    "recipe": str,
    "stage2_data": str,
    "data_parts": dict,
    "stage2_parts": dict,
}
# Numbers of each part, see `recipes.tracking.goodput`.
_PART = ("started", "ended", "steps_s", "recovery_s", "evaluation", "saving", "going_back")


def read_run_file(run_dir: Path) -> dict[str, Any]:
    """Reads the ``run.json`` of a run; empty if there is none yet.

    Raises:
        CheckpointError: It is damaged.
    """
    path = run_dir / _FILE
    if not os.path.lexists(path):
        return {}
    try:
        content = read_json_object(path)
        _check_types(content)
    except ValueError as error:
        remedy = "Restore it, or start a new run with resume=none."
        raise CheckpointError.one("resume", str(path), f"it {error}", remedy) from None
    return content


def _check_types(content: Mapping[str, Any]) -> None:
    """Raises ValueError, with a clause, for a value that is not of the kind that runs write."""
    for key, kind in _TYPES.items():
        value = content.get(key)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"has a {key} of the wrong kind, {type(value).__name__}")
    parts = content.get("parts") or []
    numbers = [part.get(name, 0.0) if isinstance(part, dict) else None for part in parts for name in _PART]
    numbers += [content.get("started") or 0.0]
    if not all(isinstance(one, int | float) and math.isfinite(one) for one in numbers):
        raise ValueError("has parts that are no times of processes")
    if not all("started" in part for part in parts):
        raise ValueError("has parts that are no times of processes")


def write_run_file(run_dir: Path, **values: Any) -> None:
    """Adds values to ``run.json``."""
    atomic_write_json(run_dir / _FILE, read_run_file(run_dir) | values)
