"""Files and folders that are either there in full or not there: temporary name, fsync, rename."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from moe.errors import DiskError, Mistake

_REMEDIES = {
    errno.ENOSPC: "Free some space there, or write to another disk.",
    errno.EDQUOT: "Your quota there is used up: delete something, or write to another disk.",
    errno.EACCES: "Make the folder writable, or write somewhere else.",
    errno.EPERM: "Make the folder writable, or write somewhere else.",
    errno.EROFS: "The file system is mounted read-only: write somewhere else.",
    errno.ENOENT: "The folder vanished, or is on a disk that this machine does not share with rank 0.",
}


def disk_mistake(path: str | Path, error: OSError) -> Mistake:
    """Describes what the operating system refused at ``path``, and what to do about it.

    Args:
        path: The file or folder that was being written. The error's own file name, if any, is added.
        error: The operating system's answer.
    """
    cause = error.strerror or str(error)
    where = f" ({error.filename})" if error.filename and str(error.filename) != str(path) else ""
    remedy = _REMEDIES.get(error.errno or 0, "Check the disk, then try again.")
    return Mistake(str(path), cause, f"could not be written{where}", remedy)


def sync_file(file: IO[Any] | int) -> None:
    """Waits until the disk has what was written to an open file, or to a descriptor."""
    if isinstance(file, int):
        os.fsync(file)
        return
    file.flush()
    os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Makes the names in ``folder`` (creations, renames, deletions) survive a power cut."""
    sync_path(folder)


def sync_contents(folder: Path) -> None:
    """Waits until the disk has all files of a folder and their names."""
    for path in [*folder.iterdir(), folder]:
        sync_path(path)


def sync_path(path: Path) -> None:
    """Waits until the disk has a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    """Writes a new file and waits until the disk has it. Not atomic; raises plain OSError."""
    with path.open("wb") as file:
        file.write(data)
        sync_file(file)


def rename_file(temporary: Path, path: Path) -> None:
    """Gives a file that the disk has its name, and makes the name survive a power cut."""
    os.replace(temporary, path)
    fsync_folder(path.parent)


def replace_folder(temporary: Path, folder: Path, aside: Path) -> None:
    """Gives a finished folder its name; an older one of that name is moved aside, then deleted."""
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        folder.rename(aside)
    temporary.rename(folder)
    fsync_folder(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path to write to; on leaving, the file written there replaces ``path`` in one step.

    Missing parent folders are made. After a crash at any moment the file is the old or the new one, in full.

    Raises:
        DiskError: It could not be written; the old file, if any, is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            sync_path(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)
    except OSError as error:
        raise DiskError([disk_mistake(path, error)]) from error


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Replaces the file at ``path`` by ``data`` in one step; see `atomic_file`."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Replaces the file at ``path`` by ``text`` (UTF-8) in one step; see `atomic_file`."""
    atomic_write_bytes(path, text.encode())


def atomic_write_json(path: str | Path, value: Any) -> None:
    """Writes ``value`` as indented JSON in one step; see `atomic_file`.

    NaN and infinities are written as Python's ``NaN`` and ``Infinity``.

    Raises:
        DiskError: It could not be written; the old file, if any, is untouched.
        TypeError: ``value`` is not JSON; nothing is touched.
    """
    atomic_write_text(path, json.dumps(value, indent=2) + "\n")
