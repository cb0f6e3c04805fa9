"""Goodput: the share of a run's time that has trained it.

Goodput is the time of the optimizer steps that still count (each step of a stage once: a resume drops those
past its checkpoint; neither those that were skipped nor those that a return to a checkpoint has undone) over
the time since the run's first command was given. Start-up, data, surgery, evaluation, saving, export, steps
that were lost, and the time between two processes of the run are thus all in the denominator. ``run.json``
records when each process of the run began, and how and when it ended; for a killed one, both its end and
its steps come from the rows that it left.

A recovery lasts from the last step before a process failed to the first step of a process after it. One that
was asked to stop, or ended by an error of its user, has not failed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.runtime.clock import steady_time
from recipes.runtime.run_file import METRICS_FILE, read_run_file, write_run_file
from recipes.tracking.metrics_log import read_rows

_PARTS = "parts"
_SPENT = ("evaluation", "saving")


class GoodputLedger:
    """The parts of a run, on the rank that writes. Open it before rows are dropped by a resume."""

    def __init__(self, run_dir: Path, started: float, now: float | None = None) -> None:
        """Ends the part of a killed process, and begins that of this one.

        Args:
            run_dir: The run directory.
            started: Time of the command, by `steady_time`.
            now: The same of this moment; None to look at the clock. If the run has seen a later time, the
                clock was set back: stderr says so, and all times of this process count from then on.
        """
        self._run_dir = run_dir
        before: list[dict[str, Any]] = read_run_file(run_dir).get(_PARTS, [])
        rows = list(read_rows(run_dir / METRICS_FILE)) if before else []
        self._failed_at = _failed_at(before, rows)
        self._before = [_ended(part, rows) for part in before]
        self._offset_s = _set_back(run_dir, self._before, rows, steady_time() if now is None else now)
        self._part: dict[str, Any] = {"started": started + self._offset_s, "steps_s": 0.0}
        self._kept_s = 0.0
        self.recount()
        self._write()

    def now(self) -> float:
        """Returns the time for rows and figures, which is never before that of an earlier process."""
        return steady_time() + self._offset_s

    def recount(self) -> None:
        """Recounts the steps after rows were dropped."""
        self._kept_s = _seconds(list(read_rows(self._run_dir / METRICS_FILE)))

    def add_step(self, seconds: float, *, counts: bool = True) -> None:
        """Adds a finished step; skipped ones do not count."""
        self._kept_s += seconds if counts else 0.0
        self._part["steps_s"] += seconds

    def recovery(self, now: float) -> float | None:
        """Returns the seconds of a recovery at the first step after a failure, else None.

        Args:
            now: From `now`.
        """
        if self._failed_at is None:
            return None
        seconds, self._failed_at = max(0.0, now - self._failed_at), None
        self._part["recovery_s"] = seconds
        self._write()
        return seconds

    def goodput(self, now: float) -> float:
        """Returns the goodput up to now."""
        return _share(self._kept_s, now - self._first)

    def figures(self, now: float, spent: Mapping[str, float]) -> dict[str, float | int]:
        """Returns the goodput and the uses of the other time in seconds, for ``summary.json``.

        Args:
            now: From `now`.
            spent: Seconds of this process, see `recipes.training.training_loop.Loop.spent`.
        """
        parts = [*self._before, self._part | dict(spent) | {"ended": now}]
        wall = max(0.0, now - self._first)
        alive = _alive(parts)
        stepped = sum(part["steps_s"] for part in parts)
        recoveries = [part["recovery_s"] for part in parts if "recovery_s" in part]
        aside = {kind: sum(part.get(kind, 0.0) for part in parts) for kind in _SPENT}
        return {
            "goodput": _share(self._kept_s, wall),
            "goodput_while_running": _share(self._kept_s, alive),
            "wall_s": wall,
            "steps_s": self._kept_s,
            "lost_steps_s": max(0.0, stepped - self._kept_s),
            **{f"{kind}_s": seconds for kind, seconds in aside.items()},
            "other_s": max(0.0, alive - max(stepped, self._kept_s) - sum(aside.values())),
            "down_s": max(0.0, wall - alive),
            "processes": len(parts),
            "recoveries": len(recoveries),
            "recovery_s": sum(recoveries),
            "recovery_worst_s": max(recoveries, default=0.0),
        }

    def close(self, spent: Mapping[str, float], *, failed: bool = False) -> None:
        """Ends the part of this process.

        Args:
            spent: Seconds of this process, as for `figures`.
            failed: True if the process neither finished, was asked to stop, nor met a user's error.
        """
        self._part |= dict(spent) | {"ended": self.now(), "failed": failed}
        self._write()

    @property
    def _first(self) -> float:
        return min(float(part["started"]) for part in [*self._before, self._part])

    def _write(self) -> None:
        write_run_file(self._run_dir, **{_PARTS: [*self._before, self._part]})


def _share(seconds: float, whole: float) -> float:
    """Returns a share of a time; where a clock was set, the time may be shorter than its part."""
    return seconds / max(seconds, whole, 1e-9)


def _set_back(
    run_dir: Path, parts: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], now: float
) -> float:
    """Returns the seconds that the clock is behind the last time that the run has seen, and says so."""
    seen = [part["ended"] for part in parts] + [row.get("time") for row in rows]
    behind = max([0.0, *(time - now for time in seen if isinstance(time, int | float))])
    if behind > 1.0:
        line = f"the clock is {behind:.0f} s behind the run's last record; its times go on from there"
        print(f"{run_dir}: {line}", file=sys.stderr, flush=True)
    return behind


def _ended(part: dict[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns a part with its end, which for a killed process is its last row."""
    if "ended" in part:
        return part
    own = [row for row in rows if row.get("time", 0.0) >= part["started"]]
    ended = max((row["time"] for row in own), default=part["started"])
    return part | {"steps_s": _seconds(own), "ended": ended, "failed": True}


def _failed_at(parts: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Returns the time of the last step before the newest processes failed; None if they did not."""
    began = None
    for part in reversed(parts):
        if "ended" in part and not part.get("failed", False):
            break
        began = part["started"]
    if began is None:
        return None
    steps = [float(row["time"]) for row in rows if row.get("step_s") and row.get("time", 0.0) >= began]
    return max(steps, default=began)


def _alive(parts: Sequence[Mapping[str, Any]]) -> float:
    """Returns the seconds in which any process of the run was alive."""
    total, until = 0.0, -math.inf
    for part in parts:
        total += max(0.0, part["ended"] - max(part["started"], until))
        until = max(until, part["ended"])
    return total


def _seconds(rows: Sequence[Mapping[str, Any]]) -> float:
    """Returns the seconds of the steps that count."""
    kept: dict[tuple[str, int], float] = {}
    for row in rows:
        stage, step = str(row.get("stage")), int(row.get("step", 0))
        if "went_back_to" in row:
            kept = {
                key: seconds
                for key, seconds in kept.items()
                if key[0] != stage or key[1] <= row["went_back_to"]
            }
        if not row.get("skipped"):
            kept[stage, step] = float(row.get("step_s") or 0.0)
    return sum(kept.values())
