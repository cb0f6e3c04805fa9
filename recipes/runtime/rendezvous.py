"""Joins the process group that torchrun describes, also when torchrun has restarted the job.

torchrun keeps one store for all its attempts. After a restart it still holds keys of earlier ranks, among
them the addresses of dead processes: a rank that reads these before they are overwritten tries to connect to
a dead process, and the attempt fails within seconds (gloo: "connectFullMesh failed"). torchrun's restart
count cannot distinguish attempts, since each machine counts by itself. The ranks of an attempt therefore
first agree on a unique name and keep all keys under it.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store, TCPStore

from moe.errors import GraftError

_WAIT_S = 600.0
_POLL_S = 0.01
_CONNECT_S = 300.0


def join(backend: str) -> None:
    """Makes the default process group from the launcher's environment variables.

    Raises:
        GraftError: Ranks did not join within ten minutes.
    """
    store, rank, world_size = next(iter(dist.rendezvous("env://")))
    if dist.is_torchelastic_launched():
        attempt = agree_on_attempt(store, rank, world_size)
        store = dist.PrefixStore(f"graft/{attempt}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def agree_on_attempt(store: dist.Store, rank: int, world_size: int, wait_s: float = _WAIT_S) -> str:
    """Agrees on a name that the ranks of this attempt share and that no earlier attempt had.

    Every rank but the first leaves a number drawn at random and waits for an answer to that number; the first
    answers whatever numbers it finds, and again where one changes, until all ranks have confirmed. A number
    left by a dead process is answered too, and nobody ever reads it.

    Args:
        store: A store that all ranks share; it may hold keys of earlier attempts.
        rank: Rank of this process.
        world_size: Number of ranks.
        wait_s: Seconds after which a rank counts as missing.

    Raises:
        GraftError: Ranks are missing; rank 0 names them.
    """
    if rank > 0:
        return _ask(store, rank, wait_s)
    attempt = uuid.uuid4().hex
    missing = list(range(1, world_size))
    answered: set[str] = set()
    deadline = time.monotonic() + wait_s
    while missing:
        for number in missing:
            asked = f"graft/asks/{number}"
            question = store.get(asked).decode() if store.check([asked]) else ""
            if question and question not in answered:
                store.set(f"graft/answers/{question}", attempt)
                answered.add(question)
        missing = [number for number in missing if not store.check([f"graft/joined/{attempt}/{number}"])]
        if missing and time.monotonic() > deadline:
            raise GraftError(
                f"ranks {', '.join(map(str, missing))} of {world_size} have not joined in {wait_s:.0f} s "
                f"(at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')})"
            )
        time.sleep(_POLL_S if missing else 0.0)
    return attempt


def _ask(store: dist.Store, rank: int, wait_s: float) -> str:
    question = uuid.uuid4().hex
    answer = f"graft/answers/{question}"
    store.set(f"graft/asks/{rank}", question)
    deadline = time.monotonic() + wait_s
    while not store.check([answer]):
        if time.monotonic() > deadline:
            raise GraftError(f"rank 0 has not answered rank {rank} in {wait_s:.0f} s")
        time.sleep(_POLL_S)
    attempt = store.get(answer).decode()
    store.set(f"graft/joined/{attempt}/{rank}", "1")
    return attempt


def launch_store() -> Store | None:
    """Connects to torchrun's store, before there is a process group; None if torchrun holds none."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_CONNECT_S))
    # It outlives the processes that torchrun replaces, whose keys do not belong to this attempt.
    attempt = agree_on_attempt(store, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    return PrefixStore(f"graft/{attempt}", store)


def group_store() -> Store:
    """Returns the process group's store, or one of this process alone if there is no group."""
    group = dist.group.WORLD
    return HashStore() if group is None else group.get_group_store().clone()
