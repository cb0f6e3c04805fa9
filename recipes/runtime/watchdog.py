"""Watchdog that ends a hanging run, names the rank that hangs, and writes the stacks of all ranks.

A thread of each rank watches its heartbeat. While training, the next beat must come in time. Otherwise, where
one rank may work for long while others wait, some rank must make progress. The first thread that finds a
limit exceeded calls all ranks, through a store, to write their stacks; it compares their positions, names the
rank that the others wait for, and all exit with a code of their own, after which torchrun's
``--max-restarts`` restarts them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import PrefixStore, Store

from recipes.runtime.clock import Clock
from recipes.runtime.config import FaultsConfig
from recipes.runtime.error_file import write_error_file
from recipes.runtime.hang import Position, describe, verdict
from recipes.runtime.heartbeat import ASIDE, Heartbeat
from recipes.runtime.stacks import dump_stacks, stack_of, where_is

HUNG = 75
"""The exit code: EX_TEMPFAIL of sysexits.h, "try again later"."""

_LONGEST_LOOK_S = 5.0
_LOOKS = 10  # within the limit
_STORE_S = 10.0
_TIMES_LONGEST = 5.0  # as long as the slowest part of a step so far


@dataclass(frozen=True)
class _Beat:
    """Last beat of a rank: its number, what comes next, and whether the rank is training."""

    count: int
    where: str
    patience: float = 1.0
    trains: bool = False


class Watchdog(Heartbeat):
    """Watchdog of one rank. All ranks must use theirs in the same way."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: Store,
        faults: FaultsConfig,
        *,
        end: Callable[[int], Any] = os._exit,
        backstop_s: float = 20.0,
        clock: Clock | None = None,
    ) -> None:
        """Prepares to watch; does nothing before `job` is entered.

        Args:
            rank: Rank of this process.
            world_size: Number of ranks.
            store: A store that all ranks share, with a connection of its own, so that no call blocks it.
            faults: Gives ``hang_s`` and ``phase_hang_s``, at least one of which is set.
            end: Ends the process with an exit code.
            backstop_s: Seconds after the limit at which a process ends, with exit code 1, whose interpreter
                is held by one call, so that no Python thread runs.
            clock: Measures all other times; by default that of the machine.
        """
        self.rank = rank
        self.world_size = world_size
        self._step_s = math.inf if faults.hang_s is None else faults.hang_s
        self._phase_s = math.inf if faults.phase_hang_s is None else faults.phase_hang_s
        self._folder: Path | None = None
        self._store: Store = PrefixStore("graft/watch", store)
        self._end = end
        self._backstop_s = backstop_s
        self._clock = clock or Clock()
        self._look_s = min(_LONGEST_LOOK_S, self._step_s / _LOOKS, self._phase_s / _LOOKS)
        self._beat = _Beat(0, "the start of the run")
        self._beats = 0
        self._beat_at = self._clock.now()
        self._longest_s = 0.0
        self._waited = 0.0
        self._all_waited = 0.0
        self._moves = 0
        self._thread_watched = 0
        self._done = threading.Event()
        store.set_timeout(timedelta(seconds=_STORE_S))

    def writes_to(self, folder: Path) -> None:
        """See `Heartbeat.writes_to`."""
        self._folder = folder

    def beat(self, where: str, patience: float = 1.0) -> None:
        """See `Heartbeat.beat`."""
        now, last = self._clock.now(), self._beat
        if last.trains and last.patience < ASIDE:
            self._longest_s = max(self._longest_s, now - self._beat_at)
        self._beat_at = now
        self._beat = _Beat(last.count + 1, where, patience, last.trains)

    def progress(self) -> None:
        """See `Heartbeat.progress`."""
        self._beats += 1

    @contextlib.contextmanager
    def job(self) -> Iterator[None]:
        """See `Heartbeat.job`."""
        self._thread_watched = threading.get_ident()
        self._done.clear()
        self.beat("the start of the run")
        thread = threading.Thread(target=self._heartbeat, name="watchdog", daemon=True)
        thread.start()
        left = ""
        try:
            yield
        except BaseException as error:
            left = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise
        finally:
            self._done.set()
            thread.join()
            faulthandler.cancel_dump_traceback_later()
            # The process that held the store may have ended before this one.
            with contextlib.suppress(RuntimeError):
                self._store.set(f"left/{self.rank}", left)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """See `Heartbeat.training`."""
        self._trains(True)
        self.beat("the start of training", ASIDE)
        try:
            yield
        finally:
            self._trains(False)
            self.beat("what comes after training")

    def _trains(self, trains: bool) -> None:
        last = self._beat
        self._beat = _Beat(last.count, last.where, ASIDE, trains)

    def _heartbeat(self) -> None:
        """Watches until the job is over. Time in which this process was stopped does not count."""
        seen, before = (-1, -1), self._clock.now()
        while not self._clock.wait(self._done, self._look_s):
            now, beat = self._clock.now(), self._beat
            passed, before = min(now - before, 2 * self._look_s), now
            moved, seen = (beat.count, self._beats) != seen, (beat.count, self._beats)
            self._waited = 0.0 if moved else self._waited + passed
            limit = self._allowed(beat)
            try:
                self._all_waited += passed
                if self._any_has_moved(moved):
                    self._all_waited = 0.0
                waited = self._waited if beat.trains else self._all_waited
                self._arm_backstop(limit - waited)
                if waited > limit:
                    mine = f"{self.rank} {time.strftime('%Y%m%d-%H%M%S')}"
                    self._all_stop(self._store.compare_set("call", "", mine).decode())
                elif self._store.check(["call"]):
                    self._all_stop(self._store.get("call").decode())
            except RuntimeError as error:  # the store is gone, and with it the process that held it
                if self._waited > limit:
                    self._stop_alone(str(error))

    def _any_has_moved(self, moved: bool) -> bool:
        """Returns True if any rank has made progress since the last call."""
        moves, self._moves = self._moves, self._store.add("moves", int(moved))
        return self._moves != moves

    def _allowed(self, beat: _Beat) -> float:
        """Returns the limit in seconds without progress, longer while training with slow steps."""
        if not beat.trains:
            return self._phase_s
        return max(self._step_s, _TIMES_LONGEST * self._longest_s) * beat.patience

    def _arm_backstop(self, left_s: float) -> None:
        """Arms a timer in C for the case that one call holds the interpreter, so that this thread cannot run.

        A single process has none: its user may stop it (Ctrl-Z), which the timer would take for a hang.
        """
        if sys.__stderr__ is None or self.world_size == 1:
            return
        if left_s == math.inf:
            faulthandler.cancel_dump_traceback_later()
            return
        with contextlib.suppress(ValueError, OSError):  # no file descriptor behind it
            faulthandler.dump_traceback_later(
                max(left_s, 0.0) + self._backstop_s, exit=True, file=sys.__stderr__
            )

    def _position(self) -> Position:
        at, kind = where_is(self._thread_watched)
        return Position(self.rank, self._beat.count, self._beat.where, self._waited, at, kind)

    def _all_stop(self, call: str) -> None:
        """Writes this rank's stacks and ends; the calling rank also names the rank to blame.

        Args:
            call: The rank that has called, and when.
        """
        caller, when = call.split()
        is_rank0, place = int(caller) == self.rank, self._place(when)
        position = self._position()
        stacks = self._dump(place, describe(position))
        self._store.set(f"at/{self.rank}", json.dumps(position.as_dict()))
        text, named = self._conclude(place) if is_rank0 else self._read_conclusion()
        self._store.set(f"read/{self.rank}", "")
        if is_rank0 or self.rank in named:
            shown = f"error: {text}\n" if is_rank0 else ""
            if self.rank in named:
                shown += f"rank {self.rank} hangs here:\n{stacks}"
            os.write(2, shown.encode())
        write_error_file(text)
        if self.rank == 0:  # its process may hold the store, from which the others read
            self._wait_for("read")
        self._end(HUNG)
        self._done.set()

    def _place(self, when: str) -> Path | None:
        """Returns the folder of this hang; None if the run has no directory yet."""
        return None if self._folder is None else self._folder / "faults" / f"hang-{when}"

    def _dump(self, place: Path | None, headline: str) -> str:
        """Writes all stacks of this process; returns that of the watched thread."""
        if place is not None:
            dump_stacks(place / f"rank-{self.rank:05d}.txt", headline)
        return stack_of(self._thread_watched)

    def _wait_for(self, what: str) -> None:
        """Waits a while until all ranks that have not left have set their key."""
        missing = list(range(self.world_size))
        deadline = self._clock.now() + 3 * self._look_s + 1.0
        while missing and self._clock.now() < deadline:
            missing = [r for r in missing if not (self._said(what, r) or self._said("left", r))]
            self._clock.sleep(self._look_s / 4 if missing else 0.0)

    def _said(self, what: str, rank: int) -> bool:
        return bool(self._store.check([f"{what}/{rank}"]))

    def _heard(self, what: str) -> dict[int, str]:
        ranks = [rank for rank in range(self.world_size) if self._said(what, rank)]
        return {rank: self._store.get(f"{what}/{rank}").decode() for rank in ranks}

    def _stop_alone(self, problem: str) -> None:
        position = self._position()
        stacks = self._dump(self._place("alone"), describe(position))
        text = f"{describe(position)}\nThe other ranks cannot be asked where they are: {problem}"
        os.write(2, f"error: {text}\n{stacks}".encode())
        write_error_file(text)
        self._end(HUNG)
        self._done.set()

    def _conclude(self, place: Path | None) -> tuple[str, Sequence[int]]:
        """Collects the ranks' positions and writes the verdict: its text, and the blamed ranks."""
        self._wait_for("at")
        positions = [Position(**json.loads(text)) for text in self._heard("at").values()]
        beat = self._beat
        option, limit, times = "phase_hang_s", self._phase_s, 1.0
        if beat.trains:
            option, limit, times = "hang_s", self._step_s, beat.patience
        text, named = verdict(positions, self.world_size, limit * times, self._heard("left"))
        if place is not None:
            text += f"\nThe stacks of all ranks are in {place}. torchrun --max-restarts=N resumes from the "
            text += "newest checkpoint automatically."
        here = f", {times:g} times that here" if times > 1 else ""
        text += f"\nThe limit is faults.{option}={limit:g}{here}: raise it if the work shown takes so long."
        self._store.set("verdict", json.dumps([text, named]))
        if place is not None:
            dump_stacks(place / "verdict.txt", text, with_stacks=False)
        return text, named

    def _read_conclusion(self) -> tuple[str, Sequence[int]]:
        self._store.wait(["verdict"], timedelta(seconds=10 * self._look_s + _STORE_S))
        text, named = json.loads(self._store.get("verdict"))
        return text, tuple(named)
