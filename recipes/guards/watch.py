"""What the training loop tells of where it is, for whoever watches it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

FIRST_STEP = 6.0
"""So many times as long as others the first step of a leg may take: kernels are compiled, buffers made."""

ASIDE = 10.0
"""So many times as long a batch of a validation may take, or a save."""


class Watch:
    """Watches nothing. `recipes.guards.watchdog.Watchdog` does."""

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Marks are expected inside, on every rank the same ones in the same order."""
        yield

    def mark(self, where: str, patience: float = 1.0) -> None:
        """This rank has come so far.

        Args:
            where: What comes next, in words.
            patience: How much longer than usual the next mark may take to come.
        """
