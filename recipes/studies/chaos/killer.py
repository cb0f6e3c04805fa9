"""Kills ranks at the drawn moments and records the recoveries."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil

from moe.errors import GraftError
from recipes.studies.chaos.moments import Kind, Moment
from recipes.studies.chaos.run_watch import RunWatch
from recipes.studies.chaos.torchrun import Torchrun

_POLL_S = 0.002
_QUICK_POLL_S = 0.0005


class ChaosError(GraftError):
    """Training did not recover."""


@dataclass
class Kill:
    """Kill of one rank, and its consequences.

    Attributes:
        kind: Aim of the kill.
        rank: Rank that was killed.
        step: Last step whose row was written.
        at: Time of the kill, by ``time.time()``.
        during_save: True if a checkpoint was being written.
        newest: Step of the newest complete checkpoint when all ranks were gone; 0 for none.
        resumed_from: Step from which training went on.
        recovery_s: From the kill to the end of the first step after it; None when another kill came first.
        lost_steps: Steps that were repeated.
    """

    kind: Kind
    rank: int
    step: int
    at: float
    during_save: bool
    newest: int = 0
    resumed_from: int | None = None
    recovery_s: float | None = None
    lost_steps: int = 0

    @property
    def as_promised(self) -> bool:
        """True unless training resumed from another checkpoint than the newest complete one."""
        return self.resumed_from is None or self.resumed_from == self.newest


class Killer:
    """Executioner of one run.

    Attributes:
        kills: Kills so far.
    """

    def __init__(
        self, job: Torchrun, watch: RunWatch, save_s: float, patience_s: float, log: Callable[[str], None]
    ) -> None:
        """Takes the job and ``save_s``, the seconds of a save, over which its kills are distributed."""
        self.kills: list[Kill] = []
        self._job = job
        self._watch = watch
        self._save_s = save_s
        self._patience_s = patience_s
        self._log = log
        self._ranks: dict[int, psutil.Process] = {}
        self._down_at = time.time()
        self._start_up_s = 0.0
        self._pending: list[Kill] = []

    def run(self, moments: Sequence[Moment], num_ranks: int) -> int:
        """Kills at every moment, unless the run ends before; returns torchrun's exit code.

        Raises:
            ChaosError: No step was done for longer than the patience.
        """
        for moment in moments:
            self._until(lambda: len(self._job.ranks()) == num_ranks, "its ranks have not started")
            if self._job.ended() is not None:
                break
            self._ranks = self._job.ranks()
            if moment.kind == "start":
                time.sleep(moment.fraction * self._start_up_s)
                if self._watch.first_row(self._down_at):
                    self._recovered()
            else:
                self._recovered()
                self._await(moment)
            if self._job.ended() is not None:
                break
            self._kill(moment)
        self._recovered()
        self._until(lambda: False, "it has not ended")
        code = self._job.ended()
        assert code is not None, "waiting ended before the job"
        return code

    def _await(self, moment: Moment) -> None:
        """Waits for the moment of a kill."""

        def reached() -> bool:
            row = self._watch.newest_row()
            return row is not None and row["step"] >= moment.step

        self._until(reached, f"it has not reached step {moment.step}")
        if moment.kind == "saves":
            self._until(
                lambda: self._watch.saving(self._down_at) is not None, "no save has begun", _QUICK_POLL_S
            )
            time.sleep(moment.fraction * self._save_s)
        else:
            row = self._watch.newest_row()
            time.sleep(moment.fraction * (row["step_s"] if row else 0.0))

    def _kill(self, moment: Moment) -> None:
        victim, row, at = self._ranks[moment.rank], self._watch.newest_row(), time.time()
        try:
            os.kill(victim.pid, signal.SIGKILL)
        except ProcessLookupError:
            return  # the run was over
        during_save = self._watch.saving(self._down_at) is not None
        kill = Kill(moment.kind, moment.rank, 0 if row is None else int(row["step"]), at, during_save)
        self._until(lambda: not any(_alive(p) for p in self._ranks.values()), "ranks do not die", 0.005)
        self._down_at = time.time()
        # Rows that the other ranks still wrote count as done.
        row = self._watch.newest_row()
        kill.step = kill.step if row is None else int(row["step"])
        kill.newest = self._watch.newest_checkpoint()
        self._pending.append(kill)
        self.kills.append(kill)

    def _recovered(self) -> None:
        """Waits for the first new step, and writes down what the kills before it have cost."""
        self._until(lambda: self._first_row() is not None, "it has not gone on")
        row = self._first_row()
        if row is None:
            return
        if not self._start_up_s:
            self._start_up_s = row["time"] - min(p.create_time() for p in self._ranks.values())
        for kill in self._pending:
            kill.resumed_from = int(row["step"]) - 1
        if self._pending:
            first, last = self._pending[0], self._pending[-1]
            first.lost_steps = max(0, first.step - int(row["step"]) + 1)
            last.recovery_s = row["time"] - last.at
            self._log(
                f"{len(self.kills):3} {last.kind:8} rank {last.rank} at step {last.step}"
                f"{' in a save' if last.during_save else ''}: went on from {last.resumed_from} "
                f"after {last.recovery_s:.1f} s"
            )
        self._pending = []

    def _first_row(self) -> dict[str, float] | None:
        newest = self._watch.newest_row()
        if newest is None or newest["time"] <= self._down_at:
            return None
        return self._watch.first_row(self._down_at)

    def _until(self, done: Callable[[], bool], otherwise: str, poll_s: float = _POLL_S) -> None:
        """Waits until a condition holds or the job has ended.

        Raises:
            ChaosError: No new row was written for longer than the patience.
        """
        since, last = time.monotonic(), self._watch.newest_row()
        while self._job.ended() is None and not done():
            time.sleep(poll_s)
            newest = self._watch.newest_row()
            if newest is not last:
                since, last = time.monotonic(), newest
            if time.monotonic() - since > self._patience_s:
                raise ChaosError(f"{otherwise}, no step for {self._patience_s:.0f} s; see {self._job.log}")


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
