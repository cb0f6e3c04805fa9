"""What a run tells of where it is, for whoever watches it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

FIRST_STEP = 6.0
"""So many times as long as others the first step of a leg may take: kernels are compiled, buffers made."""

ASIDE = 10.0
"""So many times as long the first batch of a validation may take, or a save."""


class Heartbeat:
    """Watches nothing. `recipes.runtime.watchdog.Watchdog` does."""

    @contextlib.contextmanager
    def job(self) -> Iterator[None]:
        """All that a run does once its ranks know each other. Marks are expected inside."""
        yield

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Steps, within `job`: here every rank must come from mark to mark in time."""
        yield

    def writes_to(self, folder: Path) -> None:
        """Where the stacks of a hang are written: before, they are shown alone."""

    def beat(self, where: str, patience: float = 1.0) -> None:
        """This rank has come so far. All ranks pass the same marks in the same order.

        Args:
            where: What comes next, in words.
            patience: How much longer than usual the next mark of a training may take to come.
        """

    def progress(self) -> None:
        """This rank works: a file, a layer, a tensor is done. Other ranks need not do the same."""

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """The items, each a sign of work."""
        for item in items:
            self.progress()
            yield item


class Lines:
    """Says lines of work that may take long. Each counts as progress, and so does what lies between."""

    def __init__(self, log: Callable[[str], None], heartbeat: Heartbeat) -> None:
        """Says by ``say``, and tells ``heartbeat``."""
        self._log = log
        self.progress = heartbeat.progress

    def __call__(self, line: str) -> None:
        """Says a line."""
        self.progress()
        self._log(line)
