"""Heartbeat of a run: reports where the run is to a watchdog."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

FIRST_STEP = 6.0
"""Patience for the first step of a stage, which compiles kernels and allocates buffers, in usual limits."""

ASIDE = 10.0
"""Patience for a save or the first batch of a validation, in usual limits."""


class Heartbeat:
    """Heartbeat that nobody watches; `recipes.runtime.watchdog.Watchdog` is the one that is watched."""

    @contextlib.contextmanager
    def job(self) -> Iterator[None]:
        """Encloses everything a run does once its ranks are connected. Beats are expected inside."""
        yield

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Encloses training steps, within `job`: here each rank must beat in time."""
        yield

    def writes_to(self, folder: Path) -> None:
        """Sets the folder for the stacks of a hang, which are otherwise only shown."""

    def beat(self, where: str, patience: float = 1.0) -> None:
        """Reports that this rank has come so far. All ranks pass the same beats in the same order.

        Args:
            where: Description of what comes next.
            patience: Factor of the usual limit until the next beat while training.
        """

    def progress(self) -> None:
        """Reports work that other ranks need not do: a file, a layer or a tensor is done."""

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """Yields the items and reports progress at each."""
        for item in items:
            self.progress()
            yield item


class Lines:
    """Log function for long work. Each line counts as progress, as do calls of ``progress`` in between."""

    def __init__(self, log: Callable[[str], None], heartbeat: Heartbeat) -> None:
        """Passes lines to ``log`` and progress to ``heartbeat``."""
        self._log = log
        self.progress = heartbeat.progress

    def __call__(self, line: str) -> None:
        """Logs a line."""
        self.progress()
        self._log(line)
