"""Is there room for what a run is going to write? Asked before it starts."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path

from moe.errors import DiskError
from recipes.checkpoint.shard_layout import GlobalTensor, global_shape, local_memory


def checkpoint_bytes(tensors: Mapping[str, GlobalTensor]) -> int:
    """Bytes that one checkpoint of ``tensors`` takes, all ranks together (without the few KiB of JSON)."""
    total = 0
    for value in tensors.values():
        total += math.prod(global_shape(value)) * local_memory(value)[0].dtype.itemsize
    return total


def require_space(path: str | Path, num_bytes: int, what: str) -> None:
    """Refuses to start when the disk that will hold ``path`` has too little room.

    Args:
        path: Where it will be written; the folder need not exist yet.
        num_bytes: Bytes needed.
        what: What needs them, as in "3 checkpoints of 12.1 GiB".

    Raises:
        DiskError: Fewer than ``num_bytes`` are free for this user there.
    """
    path = Path(path)
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free >= num_bytes:
        return
    rule = f"{what} needs {readable(num_bytes)}, but only {readable(free)} are free on the disk of {existing}"
    raise DiskError.one(
        "path", str(path), rule, "Free some space there, keep fewer, or write to another disk."
    )


def readable(num_bytes: int) -> str:
    """As in "12.1 GiB"."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} bytes"
