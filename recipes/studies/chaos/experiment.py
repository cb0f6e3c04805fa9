"""Compares a run under kills with an undisturbed one."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipes.runtime.run_file import METRICS_FILE
from recipes.runtime.source_root import TRAIN
from recipes.studies.chaos.chaos_settings import ChaosSettings
from recipes.studies.chaos.killer import ChaosError, Kill, Killer
from recipes.studies.chaos.moments import draw_moments
from recipes.studies.chaos.run_watch import RunWatch
from recipes.studies.chaos.torchrun import Torchrun
from recipes.studies.chaos.verdict import difference, figures
from recipes.tracking.metrics_log import read_rows

_SLOW = "recipes.studies.chaos.slow_disk"
_REFERENCE = "reference"
# Assumed time of a save where none could be watched.
_SOME_SAVE_S = 0.02


def run_chaos(settings: ChaosSettings, log: Callable[[str], None]) -> dict[str, Any]:
    """Runs the job undisturbed, runs it again under kills, and compares.

    The run under kills has no name and no ``resume``: it must find its directory from torchrun's environment.

    Args:
        settings: Settings of both; an undisturbed run already in the folder is reused.
        log: Takes a line for every recovery.

    Returns:
        JSON-able figures: see `figures`, and the keys added here.

    Raises:
        ChaosError: A run failed.
    """
    moments = draw_moments(settings)
    shutil.rmtree(settings.run_dir("upcycle-1"), ignore_errors=True)
    save_s = _undisturbed(settings, log)
    run_dir = settings.run_dir("upcycle-1")
    started = time.monotonic()
    with _start(settings, None, len(moments) + 5) as job:
        killer = Killer(job, RunWatch(run_dir), save_s, settings.patience_s, log)
        code = killer.run(moments, settings.ranks)
    if code != 0:
        raise ChaosError(f"torchrun ended with exit code {code}; see {job.log}")
    second = [path.name for path in run_dir.parent.glob("upcycle-*") if path != run_dir]
    found = figures(killer.kills)
    return found | {
        "asked_kills": settings.kills,
        "ranks": settings.ranks,
        "steps": settings.steps,
        "save_every": settings.save_every,
        "async_save": settings.async_save,
        "simulated_disk_mib_s": settings.disk_mib_s,
        "seed": settings.seed,
        "save_s": save_s,
        "wall_s": time.monotonic() - started,
        "undisturbed_steps_s": _steps_s(settings.run_dir(_REFERENCE)),
        "difference": difference(run_dir, settings.run_dir(_REFERENCE)),
        "second_runs": second,
        "own_figures": json.loads((run_dir / "summary.json").read_text()).get("goodput"),
        "each": [_as_row(kill) for kill in killer.kills],
    }


def passed(found: dict[str, Any]) -> bool:
    """Returns True if every guarantee held."""
    whole = found["kills"] == found["asked_kills"] == found["from_newest_checkpoint"]
    return whole and found["difference"] is None and not found["second_runs"]


def _undisturbed(settings: ChaosSettings, log: Callable[[str], None]) -> float:
    """Runs the job in peace; returns the median seconds of its saves, as seen from outside."""
    run_dir = settings.run_dir(_REFERENCE)
    record = run_dir / "saves.json"
    job = [*settings.program, f"{settings.ranks} ranks", *settings.overrides(_REFERENCE)]
    before = json.loads(record.read_text()) if record.is_file() else {}
    if before.get("job") == job:
        log(f"the undisturbed run is there: {run_dir}")
        return float(before["save_s"])
    shutil.rmtree(run_dir, ignore_errors=True)
    seen: dict[str, list[float]] = {}
    watch, began = RunWatch(run_dir), time.time()
    with _start(settings, _REFERENCE, 0) as running:
        while running.ended() is None:
            if (name := watch.saving(began)) is not None:
                seen.setdefault(name, []).append(time.monotonic())
            time.sleep(0.0005)
        if running.ended() != 0:
            raise ChaosError(f"the undisturbed run ended with exit code {running.ended()}; see {running.log}")
    found = [times[-1] - times[0] for times in seen.values()]
    save_s = statistics.median(found) if found else _SOME_SAVE_S
    record.write_text(json.dumps({"save_s": save_s, "seen": len(found), "job": job}))
    took = f"{settings.steps} steps in {_steps_s(run_dir):.1f} s, a save {1e3 * save_s:.0f} ms"
    log(f"undisturbed: {took}")
    return save_s


def _start(settings: ChaosSettings, name: str | None, restarts: int) -> Torchrun:
    script = list(settings.program or TRAIN)
    if settings.disk_mib_s is not None:
        script = ["-m", _SLOW, f"{settings.disk_mib_s:g}"]
    log = settings.folder / f"{name or 'chaos'}.log"
    return Torchrun(settings.ranks, restarts, [*script, *settings.overrides(name)], log)


def _steps_s(run_dir: Path) -> float:
    return float(sum(row.get("step_s", 0.0) for row in read_rows(run_dir / METRICS_FILE)))


def _as_row(kill: Kill) -> dict[str, Any]:
    return vars(kill) | {"as_promised": kill.as_promised}
