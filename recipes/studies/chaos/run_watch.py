"""Watches a run from outside: its rows, its checkpoints, a save in progress."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recipes.checkpoint.manifest import MANIFEST, TEMPORARY, parse_step
from recipes.runtime.run_file import METRICS_FILE
from recipes.tracking.metrics_log import read_rows

_TAIL_BYTES = 1 << 14


class RunWatch:
    """Watcher of a run directory, which may not exist yet."""

    def __init__(self, run_dir: Path) -> None:
        self._metrics = run_dir / METRICS_FILE
        self._checkpoints = run_dir / "checkpoints"
        self._seen: tuple[int, int] | None = None
        self._row: dict[str, Any] | None = None

    def newest_row(self) -> dict[str, Any] | None:
        """Returns the last complete row of a step, without the first validation; None while there is none."""
        try:
            with self._metrics.open("rb") as file:
                size = file.seek(0, 2)
                mark = (self._metrics.stat().st_ino, size)
                if mark == self._seen:
                    return self._row
                file.seek(max(0, size - _TAIL_BYTES))
                lines = file.read().split(b"\n")
        except FileNotFoundError:
            return None
        self._seen, self._row = mark, _last_step(lines)
        return self._row

    def saving(self, since: float) -> str | None:
        """Returns the name of the folder of an unfinished save; None for none.

        Args:
            since: Older folders do not count, by ``time.time()``.
        """
        try:
            for path in self._checkpoints.iterdir():
                unfinished = path.name.startswith(TEMPORARY + "step-")
                if unfinished and path.stat().st_mtime > since:
                    return path.name
        except FileNotFoundError:
            return None
        return None

    def first_row(self, since: float) -> dict[str, Any] | None:
        """Returns the row of the first step after ``since``, by ``time.time()``."""
        rows = read_rows(self._metrics) if self._metrics.is_file() else []
        return next((row for row in rows if row["step"] > 0 and row["time"] > since), None)

    def newest_checkpoint(self) -> int:
        """Returns the step of the newest complete checkpoint, 0 for none."""
        if not self._checkpoints.is_dir():
            return 0
        folders = [path for path in self._checkpoints.iterdir() if (path / MANIFEST).is_file()]
        return max((parse_step(path.name) or 0 for path in folders), default=0)


def _last_step(lines: list[bytes]) -> dict[str, Any] | None:
    # The last of the lines has no end yet, and the first may have lost its beginning.
    for line in reversed(lines[:-1]):
        try:
            row: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        if row["step"] > 0:
            return row
    return None
