"""Progress of long work: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from recipes.runtime.heartbeat import Lines

LINE_EVERY = 10.0
"""Seconds between lines where there is no terminal."""


class Progress:
    """Counts documents, tokens and bytes read, and shows them."""

    def __init__(self, label: str, total_bytes: int, log: Callable[[str], None]) -> None:
        """Starts at zero.

        Args:
            label: What is being done.
            total_bytes: Bytes to read in all, as on disk.
            log: Takes the lines where stderr is no terminal.
        """
        self._label, self._total, self._log = label, total_bytes, log
        self._documents = self._tokens = self._read = 0
        self._next_line = time.monotonic() + LINE_EVERY
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total_bytes, desc=label, unit="B", unit_scale=True, file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, documents: int, tokens: int, consumed: int) -> None:
        """Adds what was done since the last call."""
        self._documents += documents
        self._tokens += tokens
        self._read += consumed
        if isinstance(self._log, Lines):
            self._log.progress()
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._documents} documents, {self._tokens} tokens", refresh=False)
            self._bar.update(consumed)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_EVERY
            share = 100 * self._read / max(self._total, 1)
            self._log(f"{self._label}: {share:.0f} %, {self._documents} documents, {self._tokens} tokens")
