"""``run.json``: record of a run that it needs to resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe.errors import CheckpointError
from recipes.runtime.atomic import atomic_write_json

_FILE = "run.json"


def read_run_file(run_dir: Path) -> dict[str, Any]:
    """Reads the ``run.json`` of a run; empty if there is none yet.

    Raises:
        CheckpointError: It is damaged.
    """
    path = run_dir / _FILE
    if not path.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        rule, remedy = f"it is not valid JSON ({error})", "Restore it, or start a new run."
        raise CheckpointError.one("resume", str(path), rule, remedy) from None
    return content


def write_run_file(run_dir: Path, **values: Any) -> None:
    """Adds values to ``run.json``."""
    atomic_write_json(run_dir / _FILE, read_run_file(run_dir) | values)
