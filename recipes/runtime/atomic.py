"""Files that are either there in full or not there: temporary name, fsync, rename."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

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
    """Says what the operating system refused at ``path``, and what to do about it.

    Args:
        path: What was being written. The error's own file name, where it has one, is added.
        error: What the operating system answered.
    """
    cause = error.strerror or str(error)
    where = f" ({error.filename})" if error.filename and str(error.filename) != str(path) else ""
    remedy = _REMEDIES.get(error.errno or 0, "Check the disk, then try again.")
    return Mistake(str(path), cause, f"could not be written{where}", remedy)


def fsync_folder(folder: Path) -> None:
    """Makes the names in ``folder`` (creations, renames, deletions) survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    """Writes a new file and waits until the disk has it. Not atomic; raises plain OSError."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def atomic_write_text(path: str | Path, text: str) -> None:
    """Replaces the file at ``path`` by ``text`` (UTF-8) in one step: readers see the old or the new one.

    Missing parent folders are made. After a crash at any moment the file is the old or the new one, in full.

    Raises:
        DiskError: It could not be written; the old file, if any, is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_synced(temporary, text.encode())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)
    except OSError as error:
        raise DiskError([disk_mistake(path, error)]) from error


def atomic_write_json(path: str | Path, value: Any) -> None:
    """Writes ``value`` as indented JSON in one step, as `atomic_write_text` does.

    NaN and infinities are written as Python's ``NaN`` and ``Infinity``.

    Raises:
        DiskError: It could not be written; the old file, if any, is untouched.
        TypeError: ``value`` is not JSON; nothing is touched.
    """
    atomic_write_text(path, json.dumps(value, indent=2) + "\n")
