"""Claims: at most one process writes to a folder.

A claim is a lock of the operating system on a small file, which names its holder. The system releases it when
the process ends, however it ends, so that a run or a conversion that was killed goes on at once.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
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
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
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
    while (handles := _try(lock)) is None:
        if time.monotonic() >= until:
            subject = lock.parent if lock.name == LOCK else "it"
            rule = f"{subject} is in use by {_holder(lock)}"
            raise InUseError.one(path, str(value), rule, "Wait until that has ended, or give another folder.")
        time.sleep(_POLL_S)
    with _held(lock, handles):
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
    while (handles := _try(lock)) is None:
        if not waits:
            log(f"waiting for {_holder(lock)}, which is making the same")
        waits = True
        if not keep_on():
            raise GaveUpError
        time.sleep(_POLL_S)
    with _held(lock, handles):
        yield


def _try(lock: Path) -> list[int] | None:
    """Returns the descriptors of the lock, the file's last; None if another process has it."""
    handles: list[int] = []
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        if lock.name == LOCK:
            # The folder, too: somebody may delete the file of a living run.
            handles.append(os.open(lock.parent, os.O_RDONLY | os.O_CLOEXEC))
        if not handles or _take(handles[0], lock):
            handles.append(os.open(lock, _FLAGS, 0o644))
            if _take(handles[-1], lock):
                if _is_named(lock, handles[-1]):
                    _describe_holder(handles[-1])
                    return handles
                _close(handles)  # the holder before has just removed it
                return _try(lock)
    except OSError as error:
        _close(handles)
        raise DiskError([disk_mistake(lock, error)]) from error
    _close(handles)
    return None


def _take(handle: int, lock: Path) -> bool:
    """Locks a descriptor; returns False if another process has it. Disks without locks are told, once."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if not stat.S_ISDIR(os.fstat(handle).st_mode):
            line = f"{lock.parent}: no locks on its disk ({error.strerror}), so let one process write there"
            print(line, file=sys.stderr, flush=True)
    return True


def _describe_holder(handle: int) -> None:
    with suppress(OSError):  # a full disk: the lock holds, and only its holder stays unnamed
        os.ftruncate(handle, 0)
        os.pwrite(handle, _description().encode(), 0)


def _close(handles: list[int]) -> None:
    for handle in handles:
        os.close(handle)


def _is_named(lock: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(lock), os.fstat(handle))
    except FileNotFoundError:
        return False


@contextmanager
def _held(lock: Path, handles: list[int]) -> Iterator[None]:
    _OPEN.update(handles)
    try:
        yield
    finally:
        with suppress(OSError):
            if _is_named(lock, handles[-1]):
                lock.unlink()
        _OPEN.difference_update(handles)
        _close(handles)


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
