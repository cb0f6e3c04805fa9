"""Token files that a writer left behind when it was killed: told from those of others, and removed."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from moe.errors import DataError
from recipes.data.indexed import bin_path, idx_path, read_index


def require_no_files(prefix: str | Path, where: str) -> None:
    """Checks that no token files would be overwritten but what a killed writer has left.

    Raises:
        DataError: A file of either name exists.
    """
    if _is_half_named(prefix):
        return
    for path in (bin_path(prefix), idx_path(prefix)):
        if os.path.lexists(path):
            raise DataError.one(where, str(path), "exists already", "Delete it, or give another prefix.")


def discard_unfinished(prefix: str | Path) -> None:
    """Deletes what writers of a pair that were killed have left; call it while the prefix is claimed."""
    if _is_half_named(prefix):
        bin_path(prefix).unlink()
    for path in (bin_path(prefix), idx_path(prefix)):
        for left in _left(path):
            left.unlink(missing_ok=True)


def _is_half_named(prefix: str | Path) -> bool:
    """Tells whether a ``.bin`` alone is ours: its writer was killed before it named the index.

    The index is then whole under its hidden name, fits the ``.bin``, and that has no hidden name any more.
    """
    tokens, index = bin_path(prefix), idx_path(prefix)
    if os.path.lexists(index) or tokens.is_symlink() or not tokens.is_file():
        return False
    for left in _left(index):
        mark = left.name.removeprefix(f".{index.name}.")
        if os.path.lexists(tokens.with_name(f".{tokens.name}.{mark}")):
            continue
        try:
            dtype, offsets = read_index(left)
        except DataError:
            continue
        if int(offsets[-1]) * dtype.itemsize == tokens.stat().st_size:
            return True
    return False


def _left(path: Path) -> Iterator[Path]:
    return path.parent.glob(f"{glob.escape(f'.{path.name}.tmp-')}*")
