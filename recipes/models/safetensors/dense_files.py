"""A dense checkpoint on disk, read tensor by tensor: names, places and bytes, never a model.

Letters: D model width, F width of a feed-forward network.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.errors import ModelError
from recipes.models.hf.ffn_names import MatrixName
from recipes.models.hf.inspection import weight_files
from recipes.models.safetensors.tensor_files import DTYPE_NAMES, TensorSpec

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
# A header larger than this is no header: the format's own readers have the same limit.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        spec: Name, dtype and shape.
        file: Which file.
        start: Where its bytes begin.
    """

    spec: TensorSpec
    file: Path
    start: int


class DenseFiles:
    """The weight files of a folder.

    Attributes:
        folder: The checkpoint.
        tensors: Every tensor by its name in the files.
    """

    def __init__(self, folder: Path) -> None:
        """Reads the headers.

        Raises:
            ModelError: A file is no safetensors file, is cut short, or holds a dtype that is not known.
        """
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self._handles: dict[Path, int] = {}
        for path in weight_files(folder):
            for stored in _read_header(path):
                self.tensors[stored.spec.name] = stored

    def close(self) -> None:
        """Closes the files; they are opened when something is read."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles = {}

    def handle(self, path: Path) -> int:
        """The descriptor of one of the files."""
        if path not in self._handles:
            self._handles[path] = os.open(path, os.O_RDONLY)
        return self._handles[path]

    def read(self, name: str) -> Tensor:
        """A tensor, whole, in memory of its own."""
        shape = self.tensors[name].spec.shape
        return self.read_run(name, 0, torch.Size(shape).numel()).view(shape)

    def read_matrix(self, where: MatrixName) -> Tensor:
        """A matrix ``[out, in]`` or bias ``[out]``, whichever way the files hold it.

        Args:
            where: By its name in these files.
        """
        part, number = where.part
        shape = self.tensors[where.tensor].spec.shape
        if number == 1:
            tensor = self.read(where.tensor)
        else:
            run = torch.Size(shape).numel() // number
            tensor = self.read_run(where.tensor, part * run, (part + 1) * run)
            tensor = tensor.view(shape[0] // number, *shape[1:])
        return tensor.t() if where.transposed else tensor

    def read_rows(self, where: MatrixName, rows: slice) -> Tensor:
        """Some rows of what `read_matrix` reads; no others are read where the files hold rows together."""
        if where.transposed:
            return self.read_matrix(where)[rows]
        part, number = where.part
        shape = self.tensors[where.tensor].spec.shape
        first, width = shape[0] // number * part, torch.Size(shape[1:]).numel()
        run = self.read_run(where.tensor, (first + rows.start) * width, (first + rows.stop) * width)
        return run.view(rows.stop - rows.start, *shape[1:])

    def read_run(self, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of a tensor, in row-major order: ``[stop - start]``."""
        stored = self.tensors[name]
        size = stored.spec.dtype.itemsize
        run = torch.empty(stop - start, dtype=stored.spec.dtype)
        view, done = memoryview(run.view(torch.uint8).numpy()), 0
        while done < len(view):
            place = stored.start + start * size + done
            got = os.preadv(self.handle(stored.file), [view[done:]], place)
            if not got:
                rule = f"{stored.file.name} ends before its tensor {name}"
                raise ModelError.one("dense", str(self.folder), rule, "Download that file again.")
            done += got
        return run


def _read_header(path: Path) -> Iterator[StoredTensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
            raise _corrupt(path, "its header is cut short")
        try:
            header: Mapping[str, Any] = json.loads(file.read(length))
        except ValueError as error:
            raise _corrupt(path, f"its header is not valid JSON ({error})") from error
    start = 8 + length
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            rule = f"its tensor {name} has dtype {entry['dtype']}"
            remedy = "Convert the checkpoint to bf16, fp16 or fp32 first."
            raise ModelError.one("dense", str(path), rule, remedy)
        spec = TensorSpec(name, dtype, tuple(entry["shape"]))
        begin, end = entry["data_offsets"]
        if end - begin != spec.num_bytes or start + end > size:
            raise _corrupt(path, f"its tensor {name} does not fit into it")
        yield StoredTensor(spec, path, start + begin)


def _corrupt(path: Path, rule: str) -> ModelError:
    return ModelError.one("dense", str(path), rule, "Download that file again.")
