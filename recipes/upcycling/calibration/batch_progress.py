"""Progress of a calibration: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

LINE_EVERY = 10.0
"""Seconds between lines where there is no terminal."""


class BatchProgress:
    """Counter of batches."""

    def __init__(self, label: str, total: int, done: int, log: Callable[[str], None] | None) -> None:
        """Starts at the batches that are done.

        Args:
            label: What is being done.
            total: Batches in all.
            done: Batches that an earlier process did.
            log: Takes lines where stderr is no terminal; None shows nothing, for ranks that do not lead.
        """
        self._label, self._total, self._done, self._log = label, total, done, log
        self._next_line = time.monotonic() + LINE_EVERY
        self._bar: Any = None
        if log is not None and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, desc=label, unit="batch", file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self) -> None:
        """Counts a batch."""
        self._done += 1
        if self._bar is not None:
            self._bar.update(1)
        elif self._log is not None and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_EVERY
            self._log(f"{self._label}: {self._done} of {self._total} batches")
