"""Clock of ranks that hang: it stands while any of them does something, so that no limit comes early.

All ranks of a case read one file: every byte of it is a tick. Their parent writes a byte whenever time may
pass (a rank hangs, or works long) and all threads of all ranks sleep. However slow or busy a machine is, a
rank that has something to do has done it before the next tick; and nobody waits for real seconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from recipes.runtime.clock import Clock

TICK_S = 2.0
_LOOK_S = 0.002  # real seconds between looks at the file
_PAUSE_S = 0.01  # between ticks: several looks
_HANGS, _WORKS = "hangs", "works-"
# Nothing is left to wait for when a hang has been let be for so long.
_MOST_TICKS = 600


class StandingClock(Clock):
    """Clock as one rank sees it."""

    def __init__(self, folder: Path) -> None:
        """Reads the clock of the case that lives in the folder."""
        self._folder = folder

    def now(self) -> float:
        """See `Clock.now`."""
        return TICK_S * _ticks(self._folder)

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """See `Clock.wait`."""
        until = self.now() + seconds
        while self.now() < until:
            if event.wait(_LOOK_S):
                return True
        return event.is_set()

    def sleep(self, seconds: float) -> None:
        """See `Clock.sleep`."""
        self.wait(threading.Event(), seconds)

    def work(self, seconds: float) -> None:
        """Takes so long by this clock, which ticks meanwhile."""
        sign = self._folder / f"{_WORKS}{os.getpid()}"
        sign.touch()
        self.sleep(seconds)
        sign.unlink()

    def hang(self) -> None:
        """Says that this rank does not come back from what follows: from now on the clock ticks."""
        (self._folder / _HANGS).touch()


@dataclass
class Ranks:
    """Ranks of a case, forked from this process.

    Attributes:
        folder: Folder of the case.
        running: Process ids by rank, of those that have not ended.
        stuck: Ranks that end by no watchdog of their own; they are killed when they alone are left.
        codes: Exit codes by rank, of those that have ended.
        passed_s: What has passed by the clock since the hang.
    """

    folder: Path
    running: dict[int, int]
    stuck: Collection[int] = ()
    codes: dict[int, int] = field(default_factory=dict)
    passed_s: float = 0.0

    def attend(self) -> None:
        """Notes who has ended, and lets time pass if it may."""
        for rank, pid in list(self.running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.codes[rank] = os.waitstatus_to_exitcode(status)
                del self.running[rank]
        if self.passed_s > _MOST_TICKS * TICK_S or self.running.keys() <= set(self.stuck):
            self.kill()
            return
        hangs = (self.folder / _HANGS).exists()
        if (hangs or any(self.folder.glob(f"{_WORKS}*"))) and all(map(sleeps, self.running.values())):
            with (self.folder / "clock").open("ab") as file:
                file.write(b".")
            self.passed_s += TICK_S if hangs else 0.0

    def kill(self) -> None:
        """Ends what is left; it has no exit code."""
        for pid in self.running.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self.running.clear()


def attend(cases: Mapping[str, Ranks]) -> None:
    """Lets the time of all cases pass until their ranks have ended."""
    try:
        while any(ranks.running for ranks in cases.values()):
            for ranks in cases.values():
                if ranks.running:
                    ranks.attend()
            time.sleep(_PAUSE_S)
    finally:
        for ranks in cases.values():
            ranks.kill()


def sleeps(pid: int) -> bool:
    """Returns True if no thread of a process does anything, or it has ended."""
    for thread in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):
            if thread.read_text().rpartition(")")[2].split()[0] in "RD":
                return False
    return True


def _ticks(folder: Path) -> int:
    try:
        return (folder / "clock").stat().st_size
    except FileNotFoundError:
        return 0
