"""Names a rank that has ended without a word, as far as those that are left can know it."""

from __future__ import annotations

import os
import re
from contextlib import suppress

import psutil

from recipes.runtime.cgroup_memory import memory_kills

# Words of gloo, nccl and torch's store when the process at the other end of a connection is gone.
_GONE = re.compile(
    r"(gloo|nccl|store|socket|recvvalue|sendbytes|recvbytes).*"
    r"(closed by peer|reset by peer|broken pipe|remote process exited|connection was likely closed)",
    re.IGNORECASE | re.DOTALL,
)


def lost_rank(error: BaseException) -> str | None:
    """Returns a sentence about the rank that an error is due to, with the remedy; None for other errors."""
    if not _GONE.search(str(error)):
        return None
    gone = missing_ranks()
    who = f"rank {', '.join(map(str, gone))} has ended without a word" if gone else "another rank has ended"
    kills = memory_kills()
    why = "the system kills a process that takes too much memory"
    if kills:
        why = f"the system has killed {kills} processes here that took too much memory"
    return (
        f"{who}, and the others cannot go on ({why}; torchrun then reports SIGKILL). Set resume=auto to go "
        "on from the newest checkpoint; torchrun --max-restarts=N does so by itself."
    )


def missing_ranks() -> list[int]:
    """Returns the ranks of this machine whose processes are gone; none where that is not known."""
    local, count = (int(os.environ.get(name, "0")) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    there = live_local_ranks()
    if there is None:
        return []
    first = int(os.environ.get("RANK", "0")) - local
    return [first + other for other in range(count) if other not in there | {local}]


def speaks_for_the_rest() -> bool:
    """Returns True on the first rank of this machine that is left."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    return local == min((live_local_ranks() or set()) | {local})


def live_local_ranks() -> set[int] | None:
    """Returns the local ranks of torchrun's processes on this machine that are alive; None if unknown."""
    found = set()
    try:
        parent = psutil.Process().parent()
        for process in [] if parent is None else parent.children():
            with suppress(psutil.NoSuchProcess):
                # A process that is ending has closed its connections, and no environment any more.
                if process.status() != psutil.STATUS_ZOMBIE and "LOCAL_RANK" in (env := process.environ()):
                    found.add(int(env["LOCAL_RANK"]))
    except (psutil.Error, OSError, ValueError):
        return None
    return found if int(os.environ.get("LOCAL_RANK", "0")) in found else None
