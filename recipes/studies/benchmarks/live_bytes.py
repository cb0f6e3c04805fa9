"""Peak memory of the tensors of a computation, on a CPU or GPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make while it is on, each from its making to its release.

    What an operation allocates and frees within itself is not seen; what autograd keeps is.

    Attributes:
        now: Bytes of the storages that are alive.
        peak: The most that `now` has been.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        """Takes the tensors that were there before, which do not count."""
        super().__init__()
        self.now = 0
        self.peak = 0
        self._bytes: dict[int, int] = {}
        # Held, so that no new storage gets the address of an old one.
        self._known = {tensor.untyped_storage()._cdata: tensor for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation and counts what it made."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and not leaf.is_meta:
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._bytes or key in self._known:
            return
        self._bytes[key] = storage.nbytes()
        self.now += self._bytes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.now -= self._bytes.pop(key)


def peak_bytes(run: Callable[[], object], known: Iterable[Tensor], device: torch.device) -> int:
    """Measures the peak bytes of a computation, beyond those held before.

    Args:
        run: The computation; on a GPU it has run before, so that memory of libraries is excluded.
        known: The tensors that it reads, which do not count.
        device: On a GPU its allocator is asked; elsewhere storages are counted.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    live = LiveBytes(known)
    with live:
        run()
    return live.peak
