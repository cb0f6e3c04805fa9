"""Copies of a rank's tensors in host memory: they are written while training changes the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor

_CGROUP = Path("/sys/fs/cgroup")
# What the rest of the machine may still take while a copy is held.
_SHARE = 0.9


class HostCopies:
    """Buffers that every save uses again: page-locked for tensors of a GPU, so that it copies by itself."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def missing_bytes(self, entries: Sequence[tuple[str, Tensor]]) -> int:
        """Memory that `take` would have to ask for."""
        return sum(tensor.nbytes for key, tensor in entries if not self._fits(key, tensor))

    def take(self, entries: Sequence[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        """Copies of the tensors as they are now. On a GPU the copy is only begun: `wait` before reading it.

        Later work on the current stream comes after the copy, so the tensors may be changed at once.

        Raises:
            RuntimeError: There is not enough memory.
        """
        wanted = {key for key, _ in entries}
        self._buffers = {key: buffer for key, buffer in self._buffers.items() if key in wanted}
        copies, on_gpu = [], False
        for key, tensor in entries:
            if not self._fits(key, tensor):
                self._buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copies.append((key, self._buffers[key].copy_(tensor.detach(), non_blocking=True)))
            on_gpu = on_gpu or tensor.is_cuda
        self._copied = None
        if on_gpu:
            self._copied = torch.cuda.Event()
            self._copied.record()
        return copies

    def wait(self) -> None:
        """Until the copies are there; for any thread."""
        if self._copied is not None:
            self._copied.synchronize()

    def _fits(self, key: str, tensor: Tensor) -> bool:
        buffer = self._buffers.get(key)
        return buffer is not None and (buffer.shape, buffer.dtype) == (tensor.shape, tensor.dtype)


def spare_bytes() -> int:
    """Host memory of this machine, or of its container, that copies may take."""
    free = psutil.virtual_memory().available
    limit, used = _cgroup_bytes("memory.max"), _cgroup_bytes("memory.current")
    if limit is not None:
        free = min(free, limit - (used or 0))
    return int(_SHARE * free)


def _cgroup_bytes(name: str) -> int | None:
    path = _CGROUP / name
    content = path.read_text(encoding="ascii").strip() if path.is_file() else "max"
    return int(content) if content.isdigit() else None
