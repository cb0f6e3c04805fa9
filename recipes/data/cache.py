"""Folders of the cache, each made once, in full or not at all, for all processes that need it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from recipes.data.indexed import disk_errors
from recipes.runtime.atomic import fsync_folder


def cached_folder(
    cache_dir: str | Path, key: str, fill: Callable[[Path, Path], None], log: Callable[[str], None]
) -> Path:
    """Returns the folder of a key, and makes it first if it is missing.

    It appears by one rename, complete. Processes that need the same one wait for the first; if the file
    system does not support locks, all do the work and the first rename wins.

    Args:
        cache_dir: The cache; created if missing.
        key: Name of the entry.
        fill: Makes the entry in the folder given first; the second is its final path.
        log: Takes a line on what was found.

    Raises:
        DiskError: The cache cannot be written, or the disk is full.
    """
    cache = Path(cache_dir).expanduser().absolute()
    entry = cache / key
    with disk_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f"{key}.lock", log):
        if entry.is_dir():
            log(f"data: using the tokens cached in {entry}")
        else:
            _fill(entry, fill)
    return entry


def _fill(entry: Path, fill: Callable[[Path, Path], None]) -> None:
    """Makes an entry under a temporary name and renames it."""
    temporary = entry.with_name(f".{entry.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        fill(temporary, entry)
        with disk_errors(entry):
            _rename_folder(temporary, entry)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename_folder(temporary: Path, entry: Path) -> None:
    fsync_folder(temporary)
    try:
        temporary.rename(entry)
    except OSError:
        # Where locks do not hold, another process may have finished first; its entry is the same.
        if not entry.is_dir():
            raise
    fsync_folder(entry.parent)


@contextlib.contextmanager
def _locked(path: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Holds an advisory lock, which the system releases even when the process dies."""
    with disk_errors(path):
        stream = path.open("w")
    with stream:
        try:
            _lock(stream, log)
        except OSError as error:
            log(f"data: {path} cannot be locked ({error}); other processes may tokenise the same too")
        yield


def _lock(stream: TextIO, log: Callable[[str], None]) -> None:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    log("data: waiting for another process that is tokenising the same documents")
    fcntl.flock(stream, fcntl.LOCK_EX)
