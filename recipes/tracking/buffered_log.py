"""Log whose rows wait in memory while the disk is full, so that training continues."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe.errors import DiskError
from recipes.tracking.metrics_log import MetricsLog

_LOG = logging.getLogger("graft.metrics")
MOST_ROWS = 20_000
"""Limit of the waiting rows; beyond it the run ends."""


class BufferedLog:
    """`MetricsLog` that warns once when the disk is full, and retries with every row.

    Args:
        path: The file.

    Raises:
        DiskError: It cannot be opened.
    """

    def __init__(self, path: str | Path) -> None:
        self._log = MetricsLog(path)
        self._waiting: deque[Mapping[str, Any]] = deque()
        self._problem: DiskError | None = None

    def append(self, row: Mapping[str, Any]) -> None:
        """Appends a row behind those that wait.

        Raises:
            DiskError: Too many wait.
            TypeError: A value is not JSON.
        """
        self._waiting.append(dict(row))
        self._flush()
        if self._problem is not None and len(self._waiting) > MOST_ROWS:
            raise self._problem

    def truncate_after(self, stage: str, step: int) -> int:
        """Drops rows, as `MetricsLog.truncate_after` does."""
        self._flush()
        self._waiting = deque(
            row for row in self._waiting if row.get("stage") != stage or row["step"] <= step
        )
        return self._log.truncate_after(stage, step)

    def sync(self) -> None:
        """Waits until the disk has every row that it takes."""
        self._flush()
        try:
            self._log.sync()
        except DiskError as error:
            self._tell(error)

    def close(self) -> None:
        """Syncs and closes.

        Raises:
            DiskError: Rows could not be written to the end.
        """
        self._flush()
        try:
            self._log.close()
        finally:
            if self._waiting and self._problem is not None:
                _LOG.warning("%s: %d rows were not written", self._log.path, len(self._waiting))
                raise self._problem

    def _flush(self) -> None:
        while self._waiting:
            try:
                self._log.append(self._waiting[0])
            except DiskError as error:
                self._tell(error)
                return
            except TypeError:
                self._waiting.popleft()
                raise
            self._waiting.popleft()
        if self._problem is not None:
            _LOG.warning("%s: the rows that have waited are written", self._log.path)
            self._problem = None

    def _tell(self, error: DiskError) -> None:
        if self._problem is None:
            _LOG.warning("%s Training goes on; rows wait in memory and are written when they can be.", error)
        self._problem = error
