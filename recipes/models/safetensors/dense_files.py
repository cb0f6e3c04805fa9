"""A checkpoint on disk, read tensor by tensor without building a model.

Letters: D model width, F width of a feed-forward network.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from moe.errors import ModelError
from recipes.models.hf.ffn_names import MatrixName
from recipes.models.hf.finite_weights import not_finite
from recipes.models.hf.weight_files import FolderError, weight_files
from recipes.runtime.safetensors_codec import HeaderError, TensorLocation, read_header

_FINITE = "Download that file again, or give a checkpoint whose weights are all finite."
_BLOCK_ELEMENTS = 1 << 22
# Weights of these dtypes have scales beside them, which nothing here applies.
_SCALED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)


class DenseFiles:
    """The weight files of a checkpoint folder.

    Attributes:
        folder: The checkpoint.
        tensors: All tensors by their names in the files.
    """

    def __init__(self, folder: Path, *, finite: bool = False, scaled: bool = False) -> None:
        """Reads the headers.

        Args:
            folder: The checkpoint.
            finite: Whether reading a tensor that holds NaN or infinity is an error that names it.
            scaled: Whether tensors may be of dtypes that have scales beside them: the caller applies these.

        Raises:
            ModelError: A file is no safetensors file, is cut short, or holds an unknown dtype.
        """
        self.folder = folder
        self._finite = finite
        self.tensors: dict[str, TensorLocation] = {}
        self._handles: dict[Path, int] = {}
        try:
            files = weight_files(folder)
        except FolderError as error:
            raise ModelError.one("dense", str(folder), str(error), error.remedy) from error
        for path in files:
            for stored in _tensors_of(path, scaled):
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

    def require_finite(self, name: str) -> None:
        """Reads a tensor for its numbers alone, a block at a time; see `read_run`."""
        total = torch.Size(self.tensors[name].spec.shape).numel()
        for start in range(0, total, _BLOCK_ELEMENTS):
            self.read_run(name, start, min(total, start + _BLOCK_ELEMENTS))

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
        """Reads elements ``start`` to ``stop`` of a tensor, in row-major order: ``[stop - start]``.

        Raises:
            ModelError: The file has become shorter, or they are not finite where they must be.
        """
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
        if self._finite and (what := not_finite(run)) is not None:
            raise ModelError.one("dense", str(stored.file), f"its tensor {name} holds {what}", _FINITE)
        return run


def _tensors_of(path: Path, scaled: bool) -> list[TensorLocation]:
    try:
        tensors = read_header(path)
    except HeaderError as error:
        raise ModelError.one("dense", str(path), str(error), "Download that file again.") from error
    for stored in tensors:
        if stored.spec.dtype in _SCALED and not scaled:
            rule = f"its tensor {stored.spec.name} has dtype {stored.spec.dtype}"
            remedy = "Write the checkpoint in bf16, fp16 or fp32 first (graft dequantize)."
            raise ModelError.one("dense", str(path), rule, remedy)
    return tensors
