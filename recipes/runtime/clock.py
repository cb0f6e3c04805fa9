"""Clocks: the time of day that never goes back, and the one by which a watchdog waits, which tests move."""

from __future__ import annotations

import threading
import time

_OFFSET = time.time() - time.monotonic()


def steady_time() -> float:
    """Returns the time of day as it was when this process began, plus what has gone by since.

    It goes on evenly when somebody sets the machine's clock.
    """
    return _OFFSET + time.monotonic()


class Clock:
    """Clock of the machine."""

    def now(self) -> float:
        """Returns seconds since some moment in the past."""
        return time.monotonic()

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Waits for the event, at most for so many seconds; returns True if it is set."""
        return event.wait(seconds)

    def sleep(self, seconds: float) -> None:
        """Waits for so many seconds."""
        time.sleep(seconds)
