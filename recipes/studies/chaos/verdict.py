"""Verdict on a run under kills: differences from the undisturbed run, and the cost of the kills."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.runtime.run_file import LOAD_FILE, METRICS_FILE
from recipes.studies.chaos.killer import Kill
from recipes.tracking.metrics_log import read_rows

# Times and measurements of the machine, which differ between any two runs.
_MEASURED = ("time", "tokens_per_s", "goodput", "mfu", "s_mfu", "s_mbu", "s_mbu_busiest_rank")
_MEASURED += ("energy_j", "joules_per_token", "memory_bytes", "save_step", "failed_saves")
# Stage of the default model: the first run trains it, and the others find it in the cache.
_DEFAULT = "dense"


def difference(run_dir: Path, reference: Path) -> str | None:
    """Returns the first difference between the results of two runs; None when they agree to the bit.

    Every figure of every step is compared (losses, gradient norms, balance losses, router statistics), the
    load of every expert at every step, and the exported weights.
    """
    ours, theirs = _computed(run_dir), _computed(reference)
    if len(ours) != len(theirs):
        return f"{len(ours)} rows instead of {len(theirs)}"
    for row, same in zip(ours, theirs, strict=True):
        for key in [*same, *(key for key in row if key not in same)]:
            if json.dumps(row.get(key)) != json.dumps(same.get(key)):
                return (
                    f"{row['stage']} step {row['step']}: {key} is {row.get(key)} instead of {same.get(key)}"
                )
    for name in (LOAD_FILE, *_weight_files(reference)):
        if _digest(run_dir / name) != _digest(reference / name):
            return f"{name} differs"
    return None


def _computed(run_dir: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if key not in _MEASURED and not key.endswith("_s")}
        for row in read_rows(run_dir / METRICS_FILE)
        if row["stage"] != _DEFAULT
    ]


def _weight_files(run_dir: Path) -> list[str]:
    return sorted(str(path.relative_to(run_dir)) for path in run_dir.glob("hf/*.safetensors"))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"


def figures(kills: Sequence[Kill]) -> dict[str, Any]:
    """Sums up the kills of a run, in seconds and steps."""
    recoveries = [kill.recovery_s for kill in kills if kill.recovery_s is not None]
    lost = [kill.lost_steps for kill in kills if kill.recovery_s is not None or kill.lost_steps]
    return {
        "kills": len(kills),
        "kills_by_aim": {kind: sum(k.kind == kind for k in kills) for kind in ("anywhere", "saves", "start")},
        "kills_during_a_save": sum(kill.during_save for kill in kills),
        "kills_before_recovery": sum(kill.recovery_s is None for kill in kills),
        "recoveries": len(recoveries),
        "recovery_sum_s": sum(recoveries),
        "recovery_median_s": statistics.median(recoveries) if recoveries else None,
        "recovery_p90_s": percentile(recoveries, 0.9),
        "recovery_max_s": max(recoveries, default=None),
        "lost_steps": sum(lost),
        "lost_steps_median": statistics.median(lost) if lost else None,
        "lost_steps_max": max(lost, default=None),
        "from_newest_checkpoint": sum(kill.as_promised for kill in kills),
    }


def percentile(values: Sequence[float], share: float) -> float | None:
    """Returns the smallest value that a share of the values does not exceed; None without values."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1)] if ordered else None
