"""Writes safetensors files whose tensors come piece by piece, in any order.

The format is a header that lists every tensor with its place, then their bytes. Sizes are known before the
first weight is read, so the files are laid out at once and filled as weights come: memory holds what is being
written and nothing else, and a conversion that was interrupted goes on where it was.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from recipes.models.hf.inspection import INDEX_NAME, SINGLE_NAME
from recipes.runtime.atomic import atomic_write_json

MAX_FILE_BYTES = 5 * 10**9
# The system's answers where it cannot copy between two files, such as one on a network's disk and one here.
_NOT_BY_THE_SYSTEM = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
_READ_BYTES = 1 << 24
#: The names that the format has for dtypes.
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of its elements."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class _Run:
    """Elements of a tensor that were written at once, and the checksum of their bytes."""

    offset: int
    count: int
    checksum: int


@dataclass(frozen=True)
class _Place:
    file: Path
    offset: int
    spec: TensorSpec


class TensorFiles:
    """The weight files of one checkpoint folder, laid out and open for writing.

    Attributes:
        total_bytes: Of all tensors.
    """

    def __init__(
        self,
        folder: Path,
        specs: Sequence[TensorSpec],
        max_bytes: int = MAX_FILE_BYTES,
        *,
        checked: bool = False,
    ) -> None:
        """Lays the files out, or finds them as an earlier process has left them.

        Args:
            folder: Where.
            specs: Every tensor.
            max_bytes: Of a file.
            checked: Whether to note what is written, for `problems`.

        Raises:
            OSError: The disk has no room for them.
        """
        self.folder = folder
        self.total_bytes = sum(spec.num_bytes for spec in specs)
        self._places: dict[str, _Place] = {}
        self._handles: dict[Path, int] = {}
        self._runs: dict[str, list[_Run]] | None = {} if checked else None
        files = list(_split(specs, max_bytes))
        for number, members in enumerate(files, start=1):
            name = SINGLE_NAME
            if len(files) > 1:
                name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            self._lay_out(folder / name, members)
        self._index = None if len(files) < 2 else {s.name: self._places[s.name].file.name for s in specs}

    def _lay_out(self, path: Path, members: Sequence[TensorSpec]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        # The widest elements first: every tensor is then aligned to its element.
        ordered = sorted(members, key=lambda spec: -spec.dtype.itemsize)
        for spec in ordered:
            end = offset + spec.num_bytes
            header[spec.name] = {
                "dtype": DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._handles[path] = handle
        os.pwrite(handle, len(text).to_bytes(8, "little") + text, 0)
        os.ftruncate(handle, start + offset)
        place = start
        for spec in ordered:
            self._places[spec.name] = _Place(path, place, spec)
            place += spec.num_bytes

    def spec(self, name: str) -> TensorSpec:
        """Of one of the tensors."""
        return self._places[name].spec

    def write(self, name: str, tensor: Tensor, offset: int = 0) -> int:
        """Writes a run of a tensor's elements, converted to its dtype; returns how many.

        Args:
            name: Of the tensor.
            tensor: Its next elements, in row-major order.
            offset: Elements of the tensor before them.
        """
        place = self._places[name]
        assert offset + tensor.numel() <= torch.Size(place.spec.shape).numel(), (name, offset, tensor.shape)
        data = tensor.detach().to("cpu", place.spec.dtype).contiguous()
        start = place.offset + offset * place.spec.dtype.itemsize
        content = memoryview(data.flatten().view(torch.uint8).numpy())
        if self._runs is not None:
            self._runs.setdefault(name, []).append(_Run(offset, data.numel(), zlib.crc32(content)))
        _write_all(self._handles[place.file], content, start)
        return data.numel()

    def problems(self) -> Iterator[str | None]:
        """Reads everything back, a tensor at a time: was each element written once, and is it what was?

        Yields:
            For every tensor what is wrong with it, or None.
        """
        assert self._runs is not None, "what is written is only noted on demand"
        for name, place in self._places.items():
            runs = sorted(self._runs.get(name, []), key=lambda run: run.offset)
            ends = [0, *(run.offset + run.count for run in runs)]
            starts = [*(run.offset for run in runs), torch.Size(place.spec.shape).numel()]
            gaps = [start - end for end, start in zip(ends, starts, strict=True)]
            if any(gaps):
                missing, doubled = sum(g for g in gaps if g > 0), -sum(g for g in gaps if g < 0)
                yield f"{name}: {missing} of its elements were not written, and {doubled} twice"
            elif any(self._checksum(place, run) != run.checksum for run in runs):
                yield f"{name}: its bytes in the file are not those that were written"
            else:
                yield None

    def _checksum(self, place: _Place, run: _Run) -> int:
        size = place.spec.dtype.itemsize
        at, left, found = place.offset + run.offset * size, run.count * size, 0
        while left:
            data = os.pread(self._handles[place.file], min(left, _READ_BYTES), at)
            if not data:
                return -1
            at, left, found = at + len(data), left - len(data), zlib.crc32(data, found)
        return found

    def copy(self, name: str, source: int, start: int) -> None:
        """Copies a tensor's bytes out of an open file; by the system where both are on one kind of disk.

        Args:
            name: Of the tensor; the file holds it in the same dtype and shape.
            source: File descriptor.
            start: Where in that file.
        """
        place = self._places[name]
        left, done = place.spec.num_bytes, 0
        while left:
            moved = _copy_run(source, self._handles[place.file], left, start + done, place.offset + done)
            if not moved:
                raise OSError(f"the file of {name} ends before its tensor does")
            left, done = left - moved, done + moved

    def sync(self) -> None:
        """Returns when everything written so far is on the disk."""
        for handle in self._handles.values():
            os.fdatasync(handle)

    def finish(self) -> None:
        """Closes the files and writes the index, where there are several."""
        for handle in self._handles.values():
            os.fsync(handle)
        self.close()
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


def _copy_run(source: int, target: int, count: int, start: int, offset: int) -> int:
    """Copies at most so many bytes from one place to another; returns how many, 0 behind the end."""
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
