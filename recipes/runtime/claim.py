"""Claims: at most one process writes to a folder.

A claim is a lock of the operating system on a small file, which names its holder. The system releases it when
the process ends, however it ends, so that a run or a conversion that was killed goes on at once.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from moe.errors import DiskError, UserError
from recipes.runtime.atomic import disk_mistake

LOCK = ".graft-lock"
"""Name of the lock of a run directory, in it; that of an output lies beside it, see `lock_beside`."""

_POLL_S = 0.1
_HELD = (errno.EWOULDBLOCK, errno.EACCES)
# Locks of this process. A lock lives as long as any copy of its descriptor, also those of forked processes.
_OPEN: set[int] = set()


class InUseError(UserError):
    """Another process writes to the folder."""


class GaveUpError(Exception):
    """The caller of `wait_for` no longer waits."""


def lock_beside(folder: Path) -> Path:
    """Returns the lock of a folder that appears only when it is complete."""
    return folder.with_name(f"{LOCK}-{folder.name}")


@contextmanager
def claim(lock: Path, path: str, value: object, *, patience_s: float = 0.0) -> Iterator[None]:
    """Holds a lock, or refuses.

    Args:
        lock: File of the lock; it and its folder are made where they are missing.
        path: Option or flag that names the folder, for the refusal.
        value: Its value.
        patience_s: How long to wait for a process that is about to end.

    Raises:
        InUseError: Another process holds it; the message names process and machine.
        DiskError: The file cannot be written.
    """
    until = time.monotonic() + patience_s
    while (handle := _try(lock)) is None:
        if time.monotonic() >= until:
            subject = lock.parent if lock.name == LOCK else "it"
            rule = f"{subject} is in use by {_holder(lock)}"
            raise InUseError.one(path, str(value), rule, "Wait until that has ended, or give another folder.")
        time.sleep(_POLL_S)
    with _held(lock, handle):
        yield


@contextmanager
def wait_for(lock: Path, log: Callable[[str], None], keep_on: Callable[[], bool]) -> Iterator[None]:
    """Holds a lock, once the process that has it is done.

    Args:
        lock: File of the lock, as for `claim`.
        log: Takes a line that names the holder, if there is one.
        keep_on: Called again and again while waiting; returns False to wait no longer.

    Raises:
        GaveUpError: ``keep_on`` said so.
        DiskError: The file cannot be written.
    """
    waits = False
    while (handle := _try(lock)) is None:
        if not waits:
            log(f"waiting for {_holder(lock)}, which is making the same")
        waits = True
        if not keep_on():
            raise GaveUpError
        time.sleep(_POLL_S)
    with _held(lock, handle):
        yield


def _try(lock: Path) -> int | None:
    """Returns the descriptor of the lock; None if another process has it."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    except OSError as error:
        raise DiskError([disk_mistake(lock, error)]) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            os.close(handle)
            return None
        line = f"{lock.parent}: no locks on its disk ({error.strerror}), so let one process write there"
        print(line, file=sys.stderr, flush=True)
    else:
        if not _is_named(lock, handle):  # the holder before has just removed it
            os.close(handle)
            return _try(lock)
    with suppress(OSError):  # a full disk: the lock holds, and only its holder stays unnamed
        os.ftruncate(handle, 0)
        os.pwrite(handle, _description().encode(), 0)
    return handle


def _is_named(lock: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(lock), os.fstat(handle))
    except FileNotFoundError:
        return False


@contextmanager
def _held(lock: Path, handle: int) -> Iterator[None]:
    _OPEN.add(handle)
    try:
        yield
    finally:
        with suppress(OSError):
            if _is_named(lock, handle):
                lock.unlink()
        _OPEN.discard(handle)
        os.close(handle)


def _description() -> str:
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(psutil.Process().create_time()))
    return f"process {os.getpid()} of {socket.gethostname()}, which began at {started}"


def _holder(lock: Path) -> str:
    try:
        with lock.open("rb") as file:
            words = file.read(300).decode(errors="replace").strip()
    except OSError:
        words = ""
    return words if words.isprintable() and words else "another process"


def _close_in_fork() -> None:
    for handle in _OPEN:
        os.close(handle)
    _OPEN.clear()


os.register_at_fork(after_in_child=_close_in_fork)
