"""Names the options that a resumed run goes on with and that it did not begin with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from recipes.config.renamed import with_new_names
from recipes.jobs.run_dir import RunDir

# Where a run lies and how it is begun: they change nothing in it.
_OF_THE_COMMAND = ("resume", "output_dir", "cache_dir", "run.name")
_SHOWN = 8


def changed_options(run_dir: RunDir, values: Mapping[str, Any]) -> str:
    """Returns the options whose values differ from those in the run's ``config.yaml``, or an empty text.

    Args:
        run_dir: The run directory, before its config is written anew.
        values: The config that is asked for, as composed.
    """
    # Options that cannot be read are written anew in a moment; run.json holds what may not change.
    then = with_new_names(_flat(read_options(run_dir.path)))
    now = _flat(values)
    # Options that a version of then did not have are not changed ones.
    changed = [key for key in now if key in then and then[key] != now[key] and key not in _OF_THE_COMMAND]
    told = [f"{key}={now[key]} (was {then[key]})" for key in changed[:_SHOWN]]
    more = [f"{len(changed) - _SHOWN} more"] if len(changed) > _SHOWN else []
    return ", ".join([*told, *more])


def read_options(folder: Path) -> dict[str, Any]:
    """Returns the options that a run has written down; empty where there are none that can be read."""
    try:
        found = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the leaves by their path."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        flat |= _flat(value, f"{path}.") if isinstance(value, dict) and value else {path: value}
    return flat
