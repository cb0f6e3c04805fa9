"""Writes safetensors files whose tensors arrive in parts, in any order.

Sizes are known before the first weight is read, so the files are laid out at once and filled as weights
arrive: memory holds only the part being written, and an interrupted conversion resumes where it stopped.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moe.errors import ModelError
from recipes.models.hf.weight_files import INDEX_NAME, SINGLE_NAME
from recipes.runtime.atomic import atomic_write_json, sync_file
from recipes.runtime.heartbeat import Heartbeat
from recipes.runtime.safetensors_codec import TensorLocation, TensorSpec, encode_header, tensor_bytes

MAX_FILE_BYTES = 5 * 10**9
# Errors by which the system says that it cannot copy between two files, e.g. on disks of two kinds.
_NOT_BY_THE_SYSTEM = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
_READ_BYTES = 1 << 24


class WrittenRun(NamedTuple):
    """Elements of a tensor that were written in one call, and the CRC-32 of their bytes."""

    name: str
    offset: int
    count: int
    checksum: int


class TensorFiles:
    """The weight files of one checkpoint folder, laid out and open for writing.

    Attributes:
        folder: The checkpoint folder.
        total_bytes: Bytes of all tensors.
        runs: What was written so far, in that order.
    """

    def __init__(self, folder: Path, specs: Sequence[TensorSpec], max_bytes: int = MAX_FILE_BYTES) -> None:
        """Lays the files out, or finds them as an earlier process left them.

        Args:
            folder: The checkpoint folder.
            specs: All tensors.
            max_bytes: Largest size of one file.

        Raises:
            OSError: The disk has no room for them.
        """
        self.folder = folder
        self.total_bytes = sum(spec.num_bytes for spec in specs)
        self._places: dict[str, TensorLocation] = {}
        self._handles: dict[Path, int] = {}
        self.runs: list[WrittenRun] = []
        files = list(_split(specs, max_bytes))
        for number, members in enumerate(files, start=1):
            name = SINGLE_NAME
            if len(files) > 1:
                name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            self._lay_out(folder / name, members)
        self._index = None if len(files) < 2 else {s.name: self._places[s.name].file.name for s in specs}

    def _lay_out(self, path: Path, members: Sequence[TensorSpec]) -> None:
        header, starts = encode_header(members, {"format": "pt"})
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._handles[path] = handle
        os.pwrite(handle, header, 0)
        os.ftruncate(handle, len(header) + sum(spec.num_bytes for spec in members))
        for spec in members:
            self._places[spec.name] = TensorLocation(spec, path, starts[spec.name])

    def spec(self, name: str) -> TensorSpec:
        """Returns the dtype and shape of one of the tensors."""
        return self._places[name].spec

    def write(self, name: str, tensor: Tensor, offset: int = 0) -> int:
        """Writes a run of a tensor's elements, converted to its dtype; returns their number.

        Args:
            name: Name of the tensor.
            tensor: The elements, in row-major order.
            offset: Number of elements of the tensor before them.
        """
        place = self._places[name]
        assert offset + tensor.numel() <= torch.Size(place.spec.shape).numel(), (name, offset, tensor.shape)
        content = tensor_bytes(tensor.detach().to("cpu", place.spec.dtype))
        self.runs.append(WrittenRun(name, offset, tensor.numel(), zlib.crc32(content)))
        _write_all(self._handles[place.file], content, place.start + offset * place.spec.dtype.itemsize)
        return tensor.numel()

    def adopt(self, runs: Sequence[WrittenRun]) -> bool:
        """Takes over what an earlier process has written, if the files still hold it; else returns False."""
        if not all(run.name in self._places and self._holds(run) for run in runs):
            return False
        self.runs += runs
        return True

    def problems(self) -> Iterator[str | None]:
        """Reads all tensors back; checks that each element was written once and that the bytes are intact.

        Yields:
            For each tensor a description of what is wrong with it, or None.
        """
        written: dict[str, list[WrittenRun]] = {name: [] for name in self._places}
        for run in self.runs:
            written[run.name].append(run)
        for name, found in written.items():
            runs = sorted(found, key=lambda run: run.offset)
            ends = [0, *(run.offset + run.count for run in runs)]
            starts = [*(run.offset for run in runs), torch.Size(self.spec(name).shape).numel()]
            gaps = [start - end for end, start in zip(ends, starts, strict=True)]
            if any(gaps):
                missing, doubled = sum(g for g in gaps if g > 0), -sum(g for g in gaps if g < 0)
                yield f"{name}: {missing} of its elements were not written, and {doubled} twice"
            elif not all(map(self._holds, runs)):
                yield f"{name}: its bytes in the file are not those that were written"
            else:
                yield None

    def _holds(self, run: WrittenRun) -> bool:
        place = self._places[run.name]
        size = place.spec.dtype.itemsize
        start = place.start + max(0, run.offset) * size
        return _checksum(self._handles[place.file], start, run.count * size) == run.checksum

    def copy(self, name: str, source: int, start: int) -> None:
        """Copies a tensor's bytes from an open file, inside the kernel where the file systems allow it.

        Args:
            name: Name of the tensor; the source holds it in the same dtype and shape.
            source: File descriptor of the source.
            start: Where its bytes begin there.
        """
        place = self._places[name]
        left, done = place.spec.num_bytes, 0
        while left:
            moved = _copy_run(source, self._handles[place.file], left, start + done, place.start + done)
            if not moved:
                raise OSError(f"the file of {name} ends before its tensor does")
            left, done = left - moved, done + moved
        checksum = _checksum(source, start, place.spec.num_bytes)
        self.runs.append(WrittenRun(name, 0, torch.Size(place.spec.shape).numel(), checksum))

    def sync(self) -> None:
        """Waits until everything written so far is on the disk."""
        for handle in self._handles.values():
            sync_file(handle)

    def finish(self, heartbeat: Heartbeat | None = None) -> None:
        """Checks the files, syncs and closes them, and writes the index if there are several.

        Args:
            heartbeat: Notified of each tensor that was read back.

        Raises:
            ModelError: They do not hold every element once, as it was written.
        """
        self.sync()
        found = list((heartbeat or Heartbeat()).each(self.problems()))
        self.close()
        if wrong := [problem for problem in found if problem is not None]:
            remedy = "Give the command again; if it fails again, check the disk."
            raise ModelError.one("files", str(self.folder), "; ".join(wrong[:3]), remedy)
        if self._index is not None:
            content = {"metadata": {"total_size": self.total_bytes}, "weight_map": self._index}
            atomic_write_json(self.folder / INDEX_NAME, content)

    def close(self) -> None:
        """Closes the files as they are."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles = {}


def _split(specs: Sequence[TensorSpec], max_bytes: int) -> Iterator[list[TensorSpec]]:
    pending: list[TensorSpec] = []
    size = 0
    for spec in specs:
        if pending and size + spec.num_bytes > max_bytes:
            yield pending
            pending, size = [], 0
        pending.append(spec)
        size += spec.num_bytes
    yield pending


def _checksum(handle: int, start: int, count: int) -> int:
    """Returns the CRC-32 of bytes in a file; -1 where it ends before them."""
    found = 0
    while count > 0:
        data = os.pread(handle, min(count, _READ_BYTES), start)
        if not data:
            return -1
        start, count, found = start + len(data), count - len(data), zlib.crc32(data, found)
    return found


def _copy_run(source: int, target: int, count: int, start: int, offset: int) -> int:
    """Copies at most ``count`` bytes; returns how many were copied, 0 behind the end of the source."""
    try:
        return os.copy_file_range(source, target, count, start, offset)
    except OSError as error:
        if error.errno not in _NOT_BY_THE_SYSTEM:
            raise
    data = os.pread(source, min(count, _READ_BYTES), start)
    _write_all(target, memoryview(data), offset)
    return len(data)


def _write_all(handle: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(handle, data, offset)
        data, offset = data[written:], offset + written
