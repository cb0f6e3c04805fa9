"""A checkpoint on disk, read tensor by tensor without building a model.

Letters: D model width, F width of a feed-forward network.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe.errors import ModelError
from recipes.models.hf.ffn_names import MatrixName
from recipes.models.hf.inspection import weight_files
from recipes.runtime.safetensors_codec import DTYPES, HeaderError, TensorSpec, read_header

# fp8 weights have scales beside them, which nothing here applies.
_READABLE = {
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        spec: Name, dtype and shape.
        file: The file that holds it.
        start: Where its bytes begin there.
    """

    spec: TensorSpec
    file: Path
    start: int


class DenseFiles:
    """The weight files of a checkpoint folder.

    Attributes:
        folder: The checkpoint.
        tensors: All tensors by their names in the files.
    """

    def __init__(self, folder: Path) -> None:
        """Reads the headers.

        Raises:
            ModelError: A file is no safetensors file, is cut short, or holds an unknown dtype.
        """
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self._handles: dict[Path, int] = {}
        for path in weight_files(folder):
            for stored in _stored_tensors(path):
                self.tensors[stored.spec.name] = stored

    def close(self) -> None:
        """Closes the files; reading opens them again."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles = {}

    def handle(self, path: Path) -> int:
        """Returns the descriptor of one of the files, opened when first needed."""
        if path not in self._handles:
            self._handles[path] = os.open(path, os.O_RDONLY)
        return self._handles[path]

    def read(self, name: str) -> Tensor:
        """Reads a whole tensor into memory of its own."""
        shape = self.tensors[name].spec.shape
        return self.read_run(name, 0, torch.Size(shape).numel()).view(shape)

    def read_matrix(self, where: MatrixName) -> Tensor:
        """Reads a matrix ``[out, in]`` or bias ``[out]``, whichever way the files store it.

        Args:
            where: Its name in these files.
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
        """Reads some rows of a matrix, and only these where the files store rows contiguously."""
        if where.transposed:
            return self.read_matrix(where)[rows]
        part, number = where.part
        shape = self.tensors[where.tensor].spec.shape
        first, width = shape[0] // number * part, torch.Size(shape[1:]).numel()
        run = self.read_run(where.tensor, (first + rows.start) * width, (first + rows.stop) * width)
        return run.view(rows.stop - rows.start, *shape[1:])

    def read_run(self, name: str, start: int, stop: int) -> Tensor:
        """Reads elements ``start`` to ``stop`` of a tensor, in row-major order: ``[stop - start]``."""
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


def _stored_tensors(path: Path) -> Iterator[StoredTensor]:
    try:
        entries = read_header(path)
    except HeaderError as error:
        raise _corrupt(path, str(error)) from error
    size = path.stat().st_size
    for entry in entries:
        dtype = DTYPES.get(entry.code)
        if dtype not in _READABLE:
            rule = f"its tensor {entry.name} has dtype {entry.code}"
            remedy = "Convert the checkpoint to bf16, fp16 or fp32 first."
            raise ModelError.one("dense", str(path), rule, remedy)
        spec = TensorSpec(entry.name, dtype, entry.shape)
        if entry.stop - entry.start != spec.num_bytes or entry.stop > size:
            raise _corrupt(path, f"its tensor {entry.name} does not fit into it")
        yield StoredTensor(spec, path, entry.start)


def _corrupt(path: Path, rule: str) -> ModelError:
    return ModelError.one("dense", str(path), rule, "Download that file again.")
