"""Folders of the cache, each made once, in full or not at all, for all processes that need it.

Each entry records the size and the CRC-32 of its files. Sizes are compared on every use; checksums once in a
process, by rank 0 alone, unless the files changed since. What is damaged is made again.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path

from recipes.data.indexed import disk_errors
from recipes.runtime.atomic import fsync_folder, write_synced
from recipes.runtime.claim import lock_beside, wait_for
from recipes.runtime.user_json import UserJsonError, read_json_file

CHECKSUMS = "checksums.json"
"""Sizes and checksums of the other files of an entry."""

_BLOCK = 1 << 24


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
    with wait_for(lock_beside(entry), lambda line: log(f"data: {line}"), lambda: True):
        fault = entry_fault(entry) if entry.is_dir() else "is missing"
        if fault is None:
            log(f"data: using the tokens cached in {entry}")
            return entry
        if entry.is_dir():
            log(f"data: {entry} is damaged ({fault}) and is made again from the text")
            with disk_errors(entry):
                _remove(entry)
        _fill(entry, fill)
    return entry


def entry_fault(entry: Path) -> str | None:
    """Returns what is wrong with the files of an entry, or None."""
    try:
        recorded: dict[str, tuple[int, int]] = read_json_file(entry / CHECKSUMS)
        sums = {name: (int(size), int(crc)) for name, (size, crc) in recorded.items()}
    except UserJsonError as error:
        return f"{CHECKSUMS} {error.clause}"
    except (AttributeError, TypeError, ValueError):
        return f"{CHECKSUMS} does not list sizes and checksums"
    for name, (size, crc) in sums.items():
        try:
            found = (entry / name).stat()
            if found.st_size != size:
                return f"{name} holds {found.st_size} bytes, not {size}"
            # The other ranks of a job read what rank 0 has just verified.
            if os.environ.get("RANK", "0") == "0" and _crc32(entry / name, size, found.st_mtime_ns) != crc:
                return f"{name} has another checksum than when it was written"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


@functools.lru_cache(maxsize=1024)
def _crc32(path: Path, size: int, mtime_ns: int) -> int:
    """Computes the CRC-32 of a file; size and time of change tell files of one name apart."""
    total = 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            total = zlib.crc32(block, total)
    return total


def _remove(entry: Path) -> None:
    """Removes an entry, which vanishes at once; processes that have it open keep their files."""
    aside = entry.with_name(f".{entry.name}.damaged-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    entry.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _fill(entry: Path, fill: Callable[[Path, Path], None]) -> None:
    """Makes an entry under a temporary name and renames it."""
    temporary = entry.with_name(f".{entry.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        fill(temporary, entry)
        with disk_errors(entry):
            found = [(path, path.stat()) for path in sorted(temporary.iterdir())]
            sums = {path.name: (at.st_size, _crc32(path, at.st_size, at.st_mtime_ns)) for path, at in found}
            write_synced(temporary / CHECKSUMS, json.dumps(sums, indent=2).encode())
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
