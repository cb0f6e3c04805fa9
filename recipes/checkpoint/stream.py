"""Writes safetensors files tensor by tensor, computing the checksum on the way.

The library's own ``save_file`` wants all tensors in host memory at once, contiguous and without shared
storage, and would leave the checksum to a second pass over the file. The format is eight bytes of header
length, a JSON header, then the raw little-endian data, so writing it takes one tensor's memory at a time.
"""

from __future__ import annotations

import itertools
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from moe.errors import CheckpointError
from recipes.checkpoint.manifest import FileRecord

_ALIGNMENT = 8
_CHUNK_BYTES = 32 * 2**20

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def require_storable(name: str, dtype: torch.dtype) -> None:
    """Refuses what the file format cannot hold.

    Raises:
        CheckpointError: There is no code for ``dtype``.
    """
    if dtype not in _CODES:
        rule = f"a checkpoint cannot hold tensors of {dtype}"
        raise CheckpointError.one(name, str(dtype), rule, "Convert it, or view it as uint8.")


def write_tensors(path: Path, tensors: Sequence[tuple[str, Tensor]]) -> FileRecord:
    """Writes a new safetensors file, fsynced, with the memory of one tensor at a time.

    Args:
        path: The file; it must not exist.
        tensors: Keys, all different, and tensors on any device, contiguous or not.

    Returns:
        Size and checksum of the file.

    Raises:
        OSError: As the operating system raised it; a part of the file may be left behind.
        CheckpointError: A dtype that the format does not know.
    """
    # Wide types first, so that every tensor starts at a multiple of its element size.
    ordered = sorted(tensors, key=lambda item: -item[1].element_size())
    header = _header(ordered)
    crc = size = 0
    with path.open("xb") as file:
        start = memoryview(len(header).to_bytes(8, "little") + header)
        for data in itertools.chain([start], (_raw(tensor) for _, tensor in ordered)):
            crc = _append(file, data, crc)
            size += len(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord.of(size, crc)


def _header(tensors: Sequence[tuple[str, Tensor]]) -> bytes:
    """The JSON header, padded with spaces so that the data starts aligned."""
    entries, end = {}, 0
    for key, tensor in tensors:
        require_storable(key, tensor.dtype)
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[key] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    assert len(entries) == len(tensors), "two tensors of one checkpoint file share a key"
    text = json.dumps(entries).encode()
    return text + b" " * (-len(text) % _ALIGNMENT)


def _raw(tensor: Tensor) -> memoryview:
    """The elements of a tensor as bytes in host memory, in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data)


def _append(file: BinaryIO, data: memoryview, crc: int) -> int:
    """Writes ``data`` and returns the CRC-32 of everything so far."""
    for start in range(0, len(data), _CHUNK_BYTES):
        chunk = data[start : start + _CHUNK_BYTES]
        file.write(chunk)
        crc = zlib.crc32(chunk, crc)
    return crc
