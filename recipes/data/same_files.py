"""Finds what is in training and validation data both: files by name, link or content, and tokens."""

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
    inodes, by_size = set(), dict[int, list[Path]]()
    for path in first:
        found = path.stat()
        inodes.add((found.st_dev, found.st_ino))
        by_size.setdefault(found.st_size, []).append(path)
    shared = []
    for path in second:
        found = path.stat()
        copies = by_size.get(found.st_size, []) if found.st_size else []
        if (found.st_dev, found.st_ino) in inodes or any(_same(path, other) for other in copies):
            shared.append(path)
    return sorted(shared)


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
