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
import torch.multiprocessing

_GRACE_SECONDS = 2.0  # how long the others may take to tell their side once one rank has failed


class RanksFailedError(AssertionError):
    """At least one rank raised, died or did not finish in time; the message holds every traceback known."""


class _Worker:
    """One rank: its process, and the pipe on which its outcome arrives."""

    def __init__(self, rank: int, arguments: tuple[Any, ...]) -> None:
        # Forked from a process that has imported what takes seconds, and that has no threads.
        context = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.preload"])
        self.connection, theirs = context.Pipe(duplex=False)
        self.rank = rank
        here = (theirs, rank, dict(os.environ))
        self.process = context.Process(target=_work, args=(*here, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    def outcome(self) -> tuple[bool, Any]:
        """(True, what the function returned) or (False, what went wrong). Only when the pipe is readable."""
        try:
            return pickle.loads(self.connection.recv_bytes())
        except EOFError:
            self.process.join(_GRACE_SECONDS)
            return False, f"the process died with exit code {self.process.exitcode}"

    def stop(self) -> None:
        """Ends the process, by force if need be, and frees its resources."""
        self.process.join(_GRACE_SECONDS if not self.process.is_alive() else 0)
        self.process.kill()
        self.process.join()
        self.process.close()
        self.connection.close()


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """As `_run_ranks`, once more where the ranks did not find one another: a loaded machine, not the test."""
    try:
        return _run_ranks(fn, world_size, *args, timeout=timeout)
    except RanksFailedError as error:
        if "connectFullMesh failed" not in str(error):
            raise
    return _run_ranks(fn, world_size, *args, timeout=timeout)


def _run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float) -> list[Any]:
    """Calls ``fn(rank, world_size, *args)`` on ``world_size`` new processes with a gloo process group.

    Each process uses one thread. The group is destroyed in any case, and no process outlives the call.

    Args:
        fn: A function at the top level of a module.
        world_size: Number of processes.
        *args: Picklable arguments.
        timeout: Seconds until all ranks must have returned, start of the processes included.

    Returns:
        What the ranks returned (picklable), by rank.

    Raises:
        RanksFailedError: A rank raised (with its traceback), died, or was not done in time.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        arguments = (world_size, str(Path(folder) / "store"), timeout, fn, args)
        workers = [_Worker(rank, arguments) for rank in range(world_size)]
        try:
            return _collect(workers, timeout)
        finally:
            for worker in workers:
                worker.stop()


def _collect(workers: list[_Worker], timeout: float) -> list[Any]:
    """Waits for all outcomes; after the first failure only a moment longer."""
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    waiting: dict[Connection, _Worker] = {worker.connection: worker for worker in workers}
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            worker = waiting.pop(connection)
            succeeded, value = worker.outcome()
            (results if succeeded else failures)[worker.rank] = value
            if not succeeded:
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    if failures or waiting:
        late = {worker.rank: f"not done after {timeout:g} seconds" for worker in waiting.values()}
        told = failures or late
        raise RanksFailedError("\n".join(f"rank {rank}: {told[rank]}" for rank in sorted(told)))
    return [results[rank] for rank in range(len(workers))]


def _work(
    connection: Connection,
    rank: int,
    environment: dict[str, str],
    world_size: int,
    store_path: str,
    timeout: float,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """What each process does: join the group, call, report, leave."""
    # That of the test, not of the process forked from.
    os.environ.clear()
    os.environ.update(environment)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(store_path, world_size)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
        )
        outcome = pickle.dumps((True, fn(rank, world_size, *args)))
    except BaseException:
        outcome = pickle.dumps((False, traceback.format_exc()))
    # Reported before the group is destroyed: that may wait for ranks that have failed.
    connection.send_bytes(outcome)
    if dist.is_initialized():
        dist.destroy_process_group()
    connection.close()
