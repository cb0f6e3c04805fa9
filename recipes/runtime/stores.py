"""Stores by which ranks tell each other things outside of training, each with a connection of its own."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store, TCPStore

from recipes.runtime.rendezvous import agree_on_attempt

_CONNECT_S = 300.0


def launch_store() -> Store | None:
    """The one of torchrun, before any process group is there; None where torchrun does not hold one."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_CONNECT_S))
    # It outlives the processes that torchrun replaces: what those have said is not of this run.
    attempt = agree_on_attempt(store, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    return PrefixStore(f"graft/{attempt}", store)


def group_store() -> Store:
    """Behind the process group; that of this process alone where there is none."""
    group = dist.group.WORLD
    return HashStore() if group is None else group.get_group_store().clone()
