"""Ranks that hang, each a process that the watchdog may end.

The ranks of all cases are forked from one process, which has imported everything, and hang side by side.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed import HashStore

from recipes.runtime.clock import Clock
from recipes.runtime.config import FaultsConfig
from recipes.runtime.rendezvous import group_store
from recipes.runtime.watchdog import Watchdog
from tests.recipes.runtime.forked import fork_ranks
from tests.recipes.runtime.standing_clock import Ranks, StandingClock, attend

RANKS = 3
HANGING_RANK = 1
LIMIT_S = 60.0
#: Cases of `RANKS` ranks each.
CASES = ("none", "sleeps", "stopped", "holds", "elsewhere")
#: The case of one rank that no other can ask.
ALONE = "alone"
# Nothing ends these: torchrun would.
_STUCK = ("stopped", "holds")
_FOR_EVER = 10**6
_BACKSTOP_S = 0.1


def hang_here(case: str, pair: dist.ProcessGroup | None = None) -> None:
    """Does not come back."""
    if case == "sleeps":
        time.sleep(_FOR_EVER)
    elif case == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif case == "holds":  # without letting any other thread of Python run
        ctypes.PyDLL(None).sleep(_FOR_EVER)
    elif case == "elsewhere":  # in a collective that no other rank comes to
        dist.all_reduce(torch.ones(1), group=pair)


def train(folder: Path, case: str) -> int:
    """A few steps with marks and a collective each, something slow that is allowed, and then the hang."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=_FOR_EVER))
    rank, clock = dist.get_rank(), StandingClock(folder)
    pair = dist.new_group([0, HANGING_RANK])
    limits = FaultsConfig(hang_s=LIMIT_S, phase_hang_s=LIMIT_S)
    heartbeat = Watchdog(rank, RANKS, group_store(), limits, backstop_s=_FOR_EVER, clock=clock)
    heartbeat.writes_to(folder)
    with heartbeat.job(), heartbeat.training():
        for step in range(3):
            heartbeat.beat(f"moe, step {step + 1}, the update")
            clock.work(LIMIT_S / 8)
            dist.all_reduce(torch.ones(1))
        heartbeat.beat("saving", 10.0)
        clock.work(2 * LIMIT_S)
        dist.barrier()
        if case != "none":
            heartbeat.beat("moe, step 4, the update")
            if rank == HANGING_RANK:
                clock.hang()
                hang_here(case, pair)
            dist.all_reduce(torch.ones(1))
    assert case == "none", "the watchdog has not ended this rank"
    return 0


class Held(Clock):
    """Clock by which no time passes, and whose watchdog first looks when its rank is about to hang."""

    def __init__(self) -> None:
        self.hangs = threading.Event()

    def now(self) -> float:
        """See `Clock.now`."""
        return 0.0

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """See `Clock.wait`."""
        self.hangs.wait()
        return event.wait(seconds)


def hold_alone() -> int:
    """Hangs without letting its own watchdog run, where no other rank would notice: only a timer ends it."""
    clock = Held()
    limits = FaultsConfig(hang_s=_BACKSTOP_S, phase_hang_s=_BACKSTOP_S)
    heartbeat = Watchdog(0, 2, HashStore(), limits, backstop_s=_BACKSTOP_S, clock=clock)
    arm, armed = faulthandler.dump_traceback_later, threading.Event()

    def note(*args: Any, **options: Any) -> None:
        arm(*args, **options)
        armed.set()

    with patch("faulthandler.dump_traceback_later", note), heartbeat.job():
        clock.hangs.set()
        armed.wait()
        hang_here("holds")
    return 0


def main(folder: Path) -> None:
    """Runs all cases and writes how every process ended."""
    running = {case: start(folder, case) for case in CASES}
    running[ALONE] = Ranks(folder / ALONE, fork_ranks(folder / ALONE, 1, lambda rank: hold_alone()))
    attend(running)
    (folder / "codes.json").write_text(json.dumps({case: ranks.codes for case, ranks in running.items()}))


def start(folder: Path, case: str) -> Ranks:
    """Forks the ranks of a case."""
    forked = fork_ranks(folder / case, RANKS, lambda rank: train(folder / case, case))
    return Ranks(folder / case, forked, [HANGING_RANK] if case in _STUCK else [])
