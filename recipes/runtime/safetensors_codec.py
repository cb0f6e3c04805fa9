"""Codec of the safetensors format: dtypes, headers, and files written tensor by tensor.

The format is eight bytes of header length, a JSON header, then the raw little-endian data. The library's own
``save_file`` wants all tensors in host memory at once, contiguous and without shared storage, and would leave
the checksum to a second pass over the file; here, one tensor's memory is enough.
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from recipes.runtime.atomic import sync_file
from recipes.runtime.user_json import read_json_text

_ALIGNMENT = 8
_CHUNK_BYTES = 32 * 2**20
# The format's own readers have the same limit.
_MAX_HEADER_BYTES = 100_000_000

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's code of each dtype that it can hold."""

CODES: Mapping[torch.dtype, str] = {dtype: code for code, dtype in DTYPES.items()}


class HeaderError(ValueError):
    """A header that cannot be read; the message is a clause about the file."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class TensorLocation:
    """Place of a tensor in a file, whose bytes begin at ``start``."""

    spec: TensorSpec
    file: Path
    start: int


def encode_header(
    specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """Lays tensors out, the widest elements first, so that each starts at a multiple of its element size.

    Returns:
        All bytes before the data, and where each tensor begins in the file, in the order of the file.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    starts, end = {}, 0
    for spec in sorted(specs, key=lambda spec: -spec.dtype.itemsize):
        start, end = end, end + spec.num_bytes
        starts[spec.name] = start
        header[spec.name] = {
            "dtype": CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    assert len(starts) == len(specs), "two tensors of one file share a name"
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    data = len(text).to_bytes(8, "little") + text
    return data, {name: len(data) + start for name, start in starts.items()}


def read_header(path: Path) -> list[TensorLocation]:
    """Reads the tensors that a file holds from its header, never its data.

    Raises:
        HeaderError: The header is damaged, a tensor leaves the file, or a dtype is unknown.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
            raise HeaderError("its header is cut short")
        try:
            header: dict[str, Any] = read_json_text(file.read(length), str(path))
        except ValueError as error:
            raise HeaderError(f"its header {error}") from error
    if not isinstance(header, dict):
        raise HeaderError("its header is no JSON object")
    header.pop("__metadata__", None)
    stored = []
    for name, entry in header.items():
        try:
            code, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            begin, end = 8 + length + first, 8 + length + last
            known = code in DTYPES
            spec = TensorSpec(name, DTYPES[code] if known else torch.uint8, shape)
            whole = begin >= 8 + length and all(type(size) is int and size >= 0 for size in shape)
        except (KeyError, TypeError, ValueError):
            raise HeaderError(f"its header does not say where the tensor {name} is") from None
        if not known:
            raise HeaderError(f"its tensor {name} has the unknown dtype {code}")
        if not whole or end - begin != spec.num_bytes or end > size:
            raise HeaderError(f"its tensor {name} does not fit into it")
        stored.append(TensorLocation(spec, path, begin))
    return stored


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Returns the elements of a tensor as bytes in host memory, in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data)


def write_tensors(path: Path, tensors: Sequence[tuple[str, Tensor]]) -> tuple[int, int]:
    """Writes a new file and waits until the disk has it, with the memory of one tensor at a time.

    Args:
        path: The file; it must not exist.
        tensors: Names, all different, and tensors on any device, contiguous or not, of dtypes in `CODES`.

    Returns:
        Size of the file in bytes, and its CRC-32.

    Raises:
        OSError: As the operating system raised it; a part of the file may be left behind.
    """
    header, starts = encode_header([TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in tensors])
    by_name = dict(tensors)
    crc = size = 0
    with path.open("xb") as file:
        for data in itertools.chain([memoryview(header)], (tensor_bytes(by_name[name]) for name in starts)):
            crc = append(file, data, crc)
            size += len(data)
        sync_file(file)
    return size, crc


def append(file: BinaryIO, data: memoryview, crc: int) -> int:
    """Writes ``data`` and returns the CRC-32 of everything so far."""
    for start in range(0, len(data), _CHUNK_BYTES):
        chunk = data[start : start + _CHUNK_BYTES]
        file.write(chunk)
        crc = zlib.crc32(chunk, crc)
    return crc
