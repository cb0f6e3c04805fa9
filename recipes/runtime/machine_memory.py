"""Memory of this process and of its machine."""

from __future__ import annotations

import errno
import gc
import resource
import sys
from pathlib import Path

import psutil

from recipes.runtime.cgroup_memory import memory_limits

_STATUS = Path("/proc/self/status")
# The rest of the free memory is left to other programs of the machine.
_SPARE_SHARE = 0.9
# A collection looks at all objects of the process, which takes tenths of a second.
_WORTH_COLLECTING = 16 << 20
# Words of torch's allocators, of oneDNN and of C++.
# A thread cannot start where its stack has no room.
_NO_MEMORY = ("not enough memory", "out of memory", "t allocate memory", "not allocate", "bad_alloc")
_NO_MEMORY += ("can't start new thread",)
# What the system says of a thread that it does not start, and of much else.
_NO_THREAD = "resource temporarily unavailable"


class LimitError(MemoryError):
    """The limit on this process's memory is too small for what comes next; the text says what that is."""


def address_space_left() -> int | None:
    """Returns the bytes that this process may still map under its limit (``ulimit -v``); None without one."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else max(0, limit - psutil.Process().memory_info().vms)


def require_address_space(num_bytes: int, what: str) -> None:
    """Checks that a library which ends the process where it gets no memory will get it.

    Args:
        num_bytes: What it may take.
        what: What takes it.

    Raises:
        LimitError: The process has a limit that leaves less.
    """
    left = address_space_left()
    if left is not None and left < num_bytes:
        raise LimitError(
            f"{what} may take {num_bytes / 2**20:.0f} MiB, and the limit on this process's memory "
            f"(ulimit -v) leaves {left / 2**20:.0f} MiB"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Returns True for an error by which Python, torch or the system says that memory is short."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    if not isinstance(error, RuntimeError):
        return False
    return any(words in text for words in _NO_MEMORY) or (
        _NO_THREAD in text and address_space_left() is not None
    )


def peak_resident_bytes(status: Path = _STATUS) -> int:
    """Returns the largest resident set of this process since it began or was reset, mapped files included."""
    try:
        peak = status_peak_bytes(status)
    except OSError:
        peak = None
    if peak is not None:
        return peak
    # The last resort: on Linux this figure includes the process that started this one.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def status_peak_bytes(status: Path) -> int | None:
    """Reads the peak of the resident set from a ``/proc/PID/status`` file; None if it holds none.

    Raises:
        OSError: The file cannot be read.
    """
    lines = status.read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


def free_and_total_bytes() -> tuple[int, int]:
    """Returns free and total main memory of the machine, or what control groups and limits leave of it."""
    memory = psutil.virtual_memory()
    free, total = memory.available, memory.total
    for limit, used in memory_limits():
        free, total = min(free, max(0, limit - used)), min(total, limit)
    left = address_space_left()
    return (free if left is None else min(free, left)), total


def collect(released: int) -> None:
    """Frees objects that hold one another, such as the modules of a model, where it is worth the time.

    Args:
        released: Bytes that nothing else refers to any more.
    """
    if released > _WORTH_COLLECTING:
        gc.collect()


def spare_bytes() -> int:
    """Returns the memory that copies of tensors may take."""
    return int(_SPARE_SHARE * free_and_total_bytes()[0])
