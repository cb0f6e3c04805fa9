"""Progress of long work: a tqdm bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from recipes.runtime.heartbeat import Lines

LINE_EVERY = 10.0
"""Seconds between lines if there is no terminal."""


def open_bar(label: str, total: int, unit: str, *, done: int = 0, **options: Any) -> Any:
    """Opens a tqdm bar on stderr; returns None where output goes to a file, or has no width (containers)."""
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        return None
    if os.get_terminal_size(sys.stderr.fileno()).columns <= 0:
        return None
    from tqdm import tqdm

    return tqdm(
        total=total, initial=done, desc=label, unit=unit, file=sys.stderr, dynamic_ncols=True, **options
    )


class Progress:
    """Counter of work that is done, shown as a bar or as lines."""

    def __init__(
        self, label: str, total: int, unit: str, log: Callable[[str], None] | None, *, done: int = 0
    ) -> None:
        """Opens the bar, if there is a terminal.

        Args:
            label: The work, as in "tokenise".
            total: Units of work in all.
            unit: Name of a unit; of bytes, "B", lines show the share instead of the count.
            log: Takes lines if there is no terminal; None shows nothing, for ranks other than 0.
            done: Units that an earlier process did.
        """
        self._label, self._total, self._unit, self._log, self._done = label, total, unit, log, done
        self._next_line = time.monotonic() + LINE_EVERY
        self._bar = None if log is None else open_bar(label, total, unit, done=done, unit_scale=unit == "B")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, count: int = 1, figures: str = "") -> None:
        """Adds units of work, with figures to show beside their count."""
        self._done += count
        if isinstance(self._log, Lines):
            self._log.progress()
        if self._bar is not None:
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update(count)
        elif self._log is not None and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_EVERY
            share = f"{100 * self._done / max(self._total, 1):.0f} %"
            text = share if self._unit == "B" else f"{self._done} of {self._total} {self._unit}"
            self._log(f"{self._label}: {', '.join(filter(None, (text, figures)))}")
