"""Ends code that came with a user's files, such as a chat template's endless loop, after a time."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager


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
