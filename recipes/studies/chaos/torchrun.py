"""Job under torchrun, with access to its ranks."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import psutil

from recipes.runtime.source_root import child_environment, torchrun


class Torchrun:
    """Running job. Leaving the context kills its remaining processes.

    Attributes:
        log: File of the output of all its processes.
    """

    def __init__(self, ranks: int, restarts: int, script: Sequence[str], log: Path) -> None:
        """Starts it.

        Args:
            ranks: Processes.
            restarts: Number of restarts that torchrun allows.
            script: The program and its arguments, as torchrun takes them.
            log: File for the output; replaced.
        """
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [*torchrun(ranks), f"--max-restarts={restarts}", *script]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command, env=child_environment(), stdout=output, stderr=subprocess.STDOUT
            )

    def __enter__(self) -> Torchrun:
        return self

    def __exit__(self, *unused: object) -> None:
        if self._process.poll() is None:
            left = [*self._children(), psutil.Process(self._process.pid)]
            for process in left:
                _kill(process)
        self._process.wait()

    def ended(self) -> int | None:
        """Returns the exit code; None while it runs."""
        return self._process.poll()

    def wait(self, seconds: float) -> int | None:
        """Waits for the end and returns the exit code; None when it takes longer."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def ranks(self) -> dict[int, psutil.Process]:
        """Returns the live processes by rank."""
        found = {}
        for process in self._children():
            try:
                rank = process.environ().get("RANK")
                alive = process.status() != psutil.STATUS_ZOMBIE
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            if rank is not None and alive:
                found[int(rank)] = process
        return found

    def _children(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self._process.pid).children()
        except psutil.NoSuchProcess:
            return []


def _kill(process: psutil.Process) -> None:
    try:
        os.kill(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
