"""Ranks that hang, each a process that the watchdog may end.

The ranks of all cases are forked from one process, which has imported everything: that takes longest.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from recipes.runtime.config import FaultsConfig
from recipes.runtime.rendezvous import group_store
from recipes.runtime.watchdog import Watchdog
from tests.patience import patience, slowness
from tests.recipes.runtime.forked import fork_ranks

RANKS = 3
HANGING_RANK = 1
LIMIT_S = round(2.0 * slowness(), 1)
CASES = ("none", "sleeps", "stopped", "holds", "elsewhere")
_FOR_EVER = 200


def hang_here(case: str, pair: dist.ProcessGroup) -> None:
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
    rank = dist.get_rank()
    pair = dist.new_group([0, HANGING_RANK])
    limits = FaultsConfig(hang_s=LIMIT_S, phase_hang_s=LIMIT_S)
    heartbeat = Watchdog(rank, RANKS, group_store(), limits, backstop_s=5.0)
    heartbeat.writes_to(folder)
    with heartbeat.job(), heartbeat.training():
        for step in range(3):
            heartbeat.beat(f"moe, step {step + 1}, the update")
            time.sleep(LIMIT_S / 8)
            dist.all_reduce(torch.ones(1))
        heartbeat.beat("saving", 10.0)
        time.sleep(2 * LIMIT_S)
        dist.barrier()
        if case != "none":
            heartbeat.beat("moe, step 4, the update")
            if rank == HANGING_RANK:
                hang_here(case, pair)
            dist.all_reduce(torch.ones(1))
    assert case == "none", "the watchdog has not ended this rank"
    return 0


def main(folder: Path) -> None:
    """Runs one case after the other and writes how every process ended: side by side they would be late."""
    codes = {case: run(folder / case, case) for case in CASES}
    (folder / "codes.json").write_text(json.dumps(codes))


def run(folder: Path, case: str) -> dict[int, int]:
    """Exit codes by rank; ends what is left of the case."""
    running = fork_ranks(folder, RANKS, lambda rank: train(folder, case))
    codes: dict[int, int] = {}
    # Nothing ends a process that is stopped: torchrun would.
    waiting = set(running) - ({HANGING_RANK} if case == "stopped" else set())
    deadline = time.monotonic() + patience(60.0)
    while waiting and time.monotonic() < deadline:
        for rank in set(waiting):
            done, status = os.waitpid(running[rank], os.WNOHANG)
            if done:
                codes[rank] = os.waitstatus_to_exitcode(status)
                waiting.remove(rank)
        time.sleep(0.05)
    for rank in running.keys() - codes.keys():
        os.kill(running[rank], signal.SIGKILL)
        os.waitpid(running[rank], 0)
    return codes
