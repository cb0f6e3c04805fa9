"""Ends a run in which a rank hangs: by name, with every rank's stack, instead of a long silence.

A thread of each rank looks at how long ago its training passed the last mark. The first one whose rank has
waited too long calls all ranks, by a store, to write down their stacks; it compares where they are, names the
rank that holds up the others, and all end with an exit code of their own, on which torchrun's
``--max-restarts`` starts them again.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import PrefixStore, Store

from recipes.error_file import write_error_file
from recipes.guards.hang import Position, describe, verdict
from recipes.guards.stacks import dump_stacks, where_is
from recipes.guards.watch import ASIDE, Watch

HUNG = 75
"""The exit code: EX_TEMPFAIL of sysexits.h, "try again later"."""

_LONGEST_LOOK_S = 5.0
_LOOKS = 10  # within the limit
_STORE_S = 10.0
_TIMES_LONGEST = 5.0  # as long as the slowest part of a step so far


class Watchdog(Watch):
    """Of one rank. All ranks must use theirs alike."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: Store,
        limit_s: float,
        folder: Path,
        *,
        end: Callable[[int], Any] = os._exit,
        backstop_s: float = 20.0,
    ) -> None:
        """Does nothing before `training` is entered.

        Args:
            rank: Of this process.
            world_size: Number of ranks.
            store: Shared by all, used by nobody else: a blocked call would block the watch as well.
            limit_s: Seconds from one mark to the next, before their patience.
            folder: The run directory.
            end: Ends the process with an exit code.
            backstop_s: So long after the limit a process ends whose Python no longer runs at all, since one
                call holds the interpreter. A thread of C does it, by the exit code 1.
        """
        self.rank = rank
        self.world_size = world_size
        self.limit_s = limit_s
        self.folder = folder
        self._shared = store
        self._store: Store = store
        self._end = end
        self._backstop_s = backstop_s
        self._look_s = min(_LONGEST_LOOK_S, limit_s / _LOOKS)
        self._number = 0
        self._mark: tuple[int, str, float] = (0, "the start of training", 1.0)
        self._marked_at = time.monotonic()
        self._longest_s = 0.0
        self._waited = 0.0
        self._thread_watched = 0
        self._done = threading.Event()
        store.set_timeout(timedelta(seconds=_STORE_S))

    def mark(self, where: str, patience: float = 1.0) -> None:
        """See `Watch.mark`."""
        now = time.monotonic()
        if self._mark[2] < ASIDE:
            self._longest_s = max(self._longest_s, now - self._marked_at)
        self._marked_at = now
        self._mark = (self._mark[0] + 1, where, patience)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """See `Watch.training`."""
        self._number += 1
        self._store = PrefixStore(f"graft/watch/{self._number}", self._shared)
        self._thread_watched = threading.get_ident()
        self._done.clear()
        self._mark = (self._mark[0], "what came before training", ASIDE)
        self.mark("the start of training", ASIDE)
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        """Looks until training is over. Time in which this process was stopped does not count as waiting."""
        seen, before = self._mark[0], time.monotonic()
        self._waited = 0.0
        while not self._done.wait(self._look_s):
            now = time.monotonic()
            count, _, patience = self._mark
            self._waited = self._waited + min(now - before, 2 * self._look_s) if count == seen else 0.0
            seen, before = count, now
            limit = self._allowed(patience)
            self._arm_backstop(limit)
            try:
                if self._waited > limit:
                    mine = f"{self.rank} {time.strftime('%Y%m%d-%H%M%S')}"
                    self._all_stop(self._store.compare_set("call", "", mine).decode())
                elif self._store.check(["call"]):
                    self._all_stop(self._store.get("call").decode())
            except RuntimeError as error:  # the store is gone, and with it the process that held it
                if self._waited > limit:
                    self._stop_alone(str(error))

    def _allowed(self, patience: float) -> float:
        """Seconds until the next mark: at least the limit, and more in a run whose steps are slow anyway."""
        return max(self.limit_s, _TIMES_LONGEST * self._longest_s) * patience

    def _arm_backstop(self, limit: float) -> None:
        """The interpreter may be held by one call for ever: then this thread does not run either.

        Not for a process alone: its user may stop it (Ctrl-Z), which the timer would take for a hang.
        """
        if sys.__stderr__ is None or self.world_size == 1:
            return
        left = limit - self._waited
        with contextlib.suppress(ValueError, OSError):  # no file descriptor behind it
            faulthandler.dump_traceback_later(
                max(left, 0.0) + self._backstop_s, exit=True, file=sys.__stderr__
            )

    def _position(self) -> Position:
        count, where, _ = self._mark
        at, kind = where_is(self._thread_watched)
        return Position(self.rank, count, where, self._waited, at, kind)

    def _all_stop(self, call: str) -> None:
        """Every rank writes its stacks; the caller, who is to blame; all end.

        Args:
            call: The rank that has called, and when.
        """
        caller, when = call.split()
        leads, place = int(caller) == self.rank, self.folder / "faults" / f"hang-{when}"
        position = self._position()
        stacks = dump_stacks(place / f"rank-{self.rank:05d}.txt", describe(position))
        self._store.set(f"at/{self.rank}", json.dumps(position.as_dict()))
        text, named = self._conclude(place) if leads else self._read_conclusion()
        self._store.set(f"read/{self.rank}", "")
        if leads or self.rank in named:
            shown = f"error: {text}\n" if leads else ""
            if self.rank in named:
                shown += f"rank {self.rank} hangs here:\n{stacks}"
            os.write(2, shown.encode())
        write_error_file(text)
        if self.rank == 0:  # its process may hold the store, from which the others read
            self._wait_for([f"read/{rank}" for rank in range(self.world_size)])
        self._end(HUNG)
        self._done.set()

    def _wait_for(self, keys: list[str]) -> None:
        """For a while."""
        deadline = time.monotonic() + 3 * self._look_s + 1.0
        while not self._store.check(keys) and time.monotonic() < deadline:
            time.sleep(self._look_s / 4)

    def _stop_alone(self, problem: str) -> None:
        position = self._position()
        stacks = dump_stacks(
            self.folder / "faults" / "hang-alone" / f"rank-{self.rank:05d}.txt", describe(position)
        )
        text = f"{describe(position)}\nThe other ranks cannot be asked where they are: {problem}"
        os.write(2, f"error: {text}\n{stacks}".encode())
        write_error_file(text)
        self._end(HUNG)
        self._done.set()

    def _conclude(self, place: Path) -> tuple[str, tuple[int, ...]]:
        """What all ranks have told within a while, and who is named."""
        keys = [f"at/{rank}" for rank in range(self.world_size)]
        self._wait_for(keys)
        told = [Position(**json.loads(self._store.get(key))) for key in keys if self._store.check([key])]
        text, named = verdict(told, self.world_size, self.limit_s)
        text += f"\nThe stacks of all ranks are in {place}. torchrun --max-restarts=N goes on from the "
        text += f"newest checkpoint by itself; faults.hang_s={self.limit_s:g} is the limit."
        self._store.set("verdict", json.dumps([text, named]))
        dump_stacks(place / "verdict.txt", text, with_stacks=False)
        return text, named

    def _read_conclusion(self) -> tuple[str, tuple[int, ...]]:
        self._store.wait(["verdict"], timedelta(seconds=10 * self._look_s + _STORE_S))
        text, named = json.loads(self._store.get("verdict"))
        return text, tuple(named)
