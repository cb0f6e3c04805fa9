"""Limits of time and memory for code that came with a user's files, such as a chat template."""

from __future__ import annotations

import ctypes
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STATM = Path("/proc/self/statm")


class TimeIsUp(BaseException):  # noqa: N818  no Exception: the code's own handlers must not swallow it
    """Raised inside the code that took too long."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises `TimeIsUp` in the block once the time has passed, in any thread, between two bytecodes.

    A single call into C (the power of two huge numbers) is not interrupted.
    """
    lock, done, thread = threading.Lock(), threading.Event(), threading.get_ident()

    def end() -> None:
        with lock:
            if not done.is_set():
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TimeIsUp))

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:  # what was raised before is delivered by the end of this block
            done.set()
        timer.cancel()


@contextmanager
def memory_limit(num_bytes: int) -> Iterator[None]:
    """Lets this process map so many bytes more in the block; beyond them Python raises MemoryError.

    A limit that is tighter already stays, and so does one that cannot be set.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        mapped = int(_STATM.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        known = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min([mapped + num_bytes, *known]), hard))
    except (OSError, ValueError):
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
