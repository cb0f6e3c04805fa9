"""Finds what is in data twice: files by name, link or content, and tokens."""

from __future__ import annotations

import filecmp
from collections.abc import Iterable
from pathlib import Path

from moe.errors import DataError
from recipes.data.config import DataConfig

SAMPLED = 1 << 16
"""Bytes at both ends that are compared first, so that different files of one size cost little."""


def shared_files(first: Iterable[Path], second: Iterable[Path]) -> list[Path]:
    """Returns the files of the second set that are in the first too, sorted.

    Two files are the same if they are one file on disk, or hold the same bytes and any at all.
    """
    seen = _Seen()
    for path in first:
        seen.add(path)
    return sorted(path for path in second if seen.find(path) is not None)


def repeated_files(paths: Iterable[Path]) -> dict[Path, Path]:
    """Returns the files that are the same as an earlier one, see `shared_files`, each with that one."""
    seen, repeated = _Seen(), dict[Path, Path]()
    for path in paths:
        earlier = seen.find(path)
        if earlier is None:
            seen.add(path)
        else:
            repeated[path] = earlier
    return repeated


class _Seen:
    """Files by what tells copies and links apart at little cost."""

    def __init__(self) -> None:
        self._by_inode: dict[tuple[int, int], Path] = {}
        self._by_size: dict[int, list[Path]] = {}

    def add(self, path: Path) -> None:
        found = path.stat()
        self._by_inode.setdefault((found.st_dev, found.st_ino), path)
        self._by_size.setdefault(found.st_size, []).append(path)

    def find(self, path: Path) -> Path | None:
        """Returns an earlier file that is the same as this one."""
        found = path.stat()
        if (linked := self._by_inode.get((found.st_dev, found.st_ino))) is not None:
            return linked
        copies = self._by_size.get(found.st_size, []) if found.st_size else []
        return next((other for other in copies if _same(path, other)), None)


def require_other_tokens(train: str, validation: str, cfg: DataConfig) -> None:
    """Checks that validation data hold other tokens than training data, however either is stored.

    Args:
        train: Hash of the training tokens.
        validation: Hash of the validation tokens.
        cfg: The data config.

    Raises:
        DataError: They are the same.
    """
    # Calibration on text of its own names one path twice, so that nothing is split off.
    if train == validation and cfg.path != cfg.validation_path:
        remedy = "Name other documents; a model is not validated on what it was trained on."
        raise DataError.one(
            "data.validation_path", cfg.validation_path, "holds the tokens of data.path", remedy
        )


def _same(one: Path, other: Path) -> bool:
    return _ends(one) == _ends(other) and filecmp.cmp(one, other, shallow=False)


def _ends(path: Path) -> tuple[bytes, bytes]:
    with path.open("rb") as stream:
        head = stream.read(SAMPLED)
        stream.seek(max(path.stat().st_size - SAMPLED, 0))
        return head, stream.read(SAMPLED)
