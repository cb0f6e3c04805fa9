"""Stores for messages between ranks outside of training, each with a connection of its own."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store, TCPStore

from recipes.runtime.rendezvous import agree_on_attempt

_CONNECT_S = 300.0


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
