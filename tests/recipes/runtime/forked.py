"""Ranks forked from one process that has imported everything, each with a group of its own to join."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path


def fork_ranks(folder: Path, ranks: int, work: Callable[[int], int]) -> dict[int, int]:
    """Starts the ranks; what they say is in ``stdout-RANK`` and ``stderr-RANK``.

    Args:
        folder: Is made.
        ranks: How many.
        work: Of a rank; returns its exit code, which is 1 after an error.

    Returns:
        Process ids by rank.
    """
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = {}
    for rank in range(ranks):
        pid = os.fork()
        if pid:
            found[rank] = pid
            continue
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT), descriptor)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), GLOO_SOCKET_IFNAME="lo")
        os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        code = 1
        try:
            code = work(rank)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return found
