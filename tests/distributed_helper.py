"""Runs a test function on several processes that talk over gloo."""

from __future__ import annotations

import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.fork_server import Forked, inherited
from tests.patience import patience

_GRACE_SECONDS = 2.0  # how long the others may take to tell their side once one rank has failed
# Ranks are given up when none of them has computed anything for so long, however long they have run.
_IDLE_SECONDS = 30.0
_LOOK_SECONDS = 5.0
_TICKS = os.sysconf("SC_CLK_TCK")


class RanksFailedError(AssertionError):
    """At least one rank raised, died or did not finish in time; the message holds every traceback known."""


class _Worker:
    """One rank: its process, and the pipe on which its outcome arrives."""

    def __init__(self, rank: int, arguments: tuple[Any, ...]) -> None:
        ours, theirs = os.pipe()
        self.connection = Connection(ours, writable=False)
        self.rank = rank
        try:
            self.process = Forked(_work, rank, *arguments, pipes=[theirs])
        finally:
            os.close(theirs)

    def outcome(self) -> tuple[bool, Any]:
        """(True, what the function returned) or (False, what went wrong). Only when the pipe is readable."""
        try:
            return pickle.loads(self.connection.recv_bytes())
        except EOFError:
            return False, f"the process died with exit code {self.process.wait(patience(_GRACE_SECONDS))}"

    def computed(self) -> int:
        """Returns the processor time that the rank has used, in ticks; 0 if it has ended."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0
        return int(fields[11]) + int(fields[12])

    def stop(self) -> None:
        """Ends the process, by force if need be, and frees its resources."""
        self.process.close()
        self.connection.close()


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float | None = None) -> list[Any]:
    """Calls `_run_ranks`, once more if the ranks did not find one another: a busy machine, not the test."""
    try:
        return _run_ranks(fn, world_size, *args, timeout=timeout)
    except RanksFailedError as error:
        if "connectFullMesh failed" not in str(error):
            raise
    return _run_ranks(fn, world_size, *args, timeout=timeout)


def _run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float | None) -> list[Any]:
    """Calls ``fn(rank, world_size, *args)`` on ``world_size`` new processes with a gloo process group.

    Each process uses one thread. The group is destroyed in any case, and no process outlives the call.

    Args:
        fn: A function at the top level of a module.
        world_size: Number of processes.
        *args: Picklable arguments.
        timeout: Seconds until all ranks must have returned; by default as long as any of them computes.

    Returns:
        What the ranks returned (picklable), by rank.

    Raises:
        RanksFailedError: A rank raised (with its traceback), died, or was not done in time.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        arguments = (world_size, str(Path(folder) / "store"), fn, args)
        workers = [_Worker(rank, arguments) for rank in range(world_size)]
        try:
            return _collect(workers, timeout)
        finally:
            for worker in workers:
                worker.stop()


def _collect(workers: list[_Worker], timeout: float | None) -> list[Any]:
    """Waits for all outcomes; after the first failure only a moment longer."""
    deadline = time.monotonic() + timeout if timeout is not None else float("inf")
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    waiting: dict[Connection, _Worker] = {worker.connection: worker for worker in workers}
    computed, looked = -1, time.monotonic()
    since = looked
    while waiting:
        now = time.monotonic()
        ready = wait(list(waiting), max(0.0, min(deadline - now, _LOOK_SECONDS)))
        if not ready:
            total, now = sum(worker.computed() for worker in waiting.values()), time.monotonic()
            # A hundredth of the time: threads that only look whether something has come use less.
            if total - computed > _TICKS * (now - looked) / 100:
                since = now
            computed, looked = total, now
            if time.monotonic() >= deadline or time.monotonic() - since > patience(_IDLE_SECONDS):
                break
        for connection in ready:
            worker = waiting.pop(connection)
            succeeded, value = worker.outcome()
            (results if succeeded else failures)[worker.rank] = value
            computed, since = -1, time.monotonic()
            if not succeeded:
                deadline = min(deadline, time.monotonic() + patience(_GRACE_SECONDS))
    if failures or waiting:
        limit = "while nothing moves" if timeout is None else f"after {timeout:g} seconds"
        late = {worker.rank: f"not done {limit}" for worker in waiting.values()}
        told = failures or late
        raise RanksFailedError("\n".join(f"rank {rank}: {told[rank]}" for rank in sorted(told)))
    return [results[rank] for rank in range(len(workers))]


def _work(rank: int, world_size: int, store_path: str, fn: Callable[..., Any], args: Any) -> None:
    """Joins the group, calls, reports and leaves: what each process does."""
    connection = Connection(inherited()[0], readable=False)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(store_path, world_size)
        # Whoever started the ranks ends them when nothing moves any more.
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(hours=1)
        )
        outcome = pickle.dumps((True, fn(rank, world_size, *args)))
    except BaseException:
        outcome = pickle.dumps((False, traceback.format_exc()))
    # Reported before the group is destroyed: that may wait for ranks that have failed.
    connection.send_bytes(outcome)
    if dist.is_initialized():
        dist.destroy_process_group()
    connection.close()
