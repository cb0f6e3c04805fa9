"""Reads single tensors of a checkpoint, whole, by one process without a process group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from recipes.checkpoint.manifest import Index, read_index, read_manifest
from recipes.checkpoint.reader import RankFiles


class CheckpointTensors:
    """The global tensors of one checkpoint.

    Attributes:
        step: Optimizer steps done when it was saved.
    """

    def __init__(self, folder: Path, index: Index, step: int, files: RankFiles) -> None:
        self.folder = folder
        self.step = step
        self._index = index
        self._files = files

    def names(self, prefix: str) -> list[str]:
        """The names that begin so, without it."""
        return [name.removeprefix(prefix) for name in self._index.tensors if name.startswith(prefix)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return tuple(self._index.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""
        found: torch.dtype = getattr(torch, self._index.tensors[name].dtype)
        return found

    def read(self, name: str) -> Tensor:
        """A tensor, put together from what the ranks wrote."""
        stored = self._index.tensors[name]
        whole = torch.empty(tuple(stored.shape), dtype=self.dtype(name))
        for box in stored.boxes:
            where = tuple(slice(o, o + s) for o, s in zip(box.offset, box.size, strict=True))
            whole[where] = self._files.read(box, tuple(slice(0, s) for s in box.size))
        return whole


@contextmanager
def open_checkpoint(folder: Path) -> Iterator[CheckpointTensors]:
    """A checkpoint whose files are open for reading; `verify_checkpoint` it first.

    Raises:
        CheckpointError: It is incomplete or damaged.
    """
    manifest = read_manifest(folder)
    index = read_index(folder, manifest)
    with RankFiles(folder) as files:
        yield CheckpointTensors(folder, index, manifest.step, files)
