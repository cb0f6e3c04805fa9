"""Clock by which a watchdog waits; tests give it one that they move."""

from __future__ import annotations

import threading
import time


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
