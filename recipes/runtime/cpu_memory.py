"""Keeps the memory of a process that trains on a CPU near what its tensors take.

Two libraries keep more. oneDNN, which multiplies bf16 on CPUs, compiles a kernel for every shape of a product
and keeps 1024 of them, half a MiB each: the experts' row counts are others at every step. And glibc keeps
what a thread has freed for that thread: forward and backward passes run in two.
"""

from __future__ import annotations

import ctypes
import os

# Kernels that oneDNN, and torch's wrapper of it, keep: those of a step's dense products and some experts.
_KERNELS = "64"
_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_M_ARENA_MAX = -8  # of malloc.h
# Less than this is not worth the time of giving it back.
_WORTH_GIVING_BACK = 256 << 20


class _MallInfo(ctypes.Structure):
    """``struct mallinfo2`` of malloc.h."""

    # Ten sizes; the ninth, fordblks, is that of all free blocks.
    _fields_ = (("before", ctypes.c_size_t * 8), ("free", ctypes.c_size_t), ("top", ctypes.c_size_t))


def keep_memory_low() -> None:
    """Limits both; call it before the first product. What a user has set in the environment stays."""
    for name in _CACHES:
        os.environ.setdefault(name, _KERNELS)
    if "MALLOC_ARENA_MAX" not in os.environ and (mallopt := _libc("mallopt")) is not None:
        mallopt(_M_ARENA_MAX, 1)


def give_back_memory() -> int:
    """Gives the system what this process has freed and keeps, if that is much; returns the bytes it kept."""
    info, trim = _libc("mallinfo2"), _libc("malloc_trim")
    if info is None or trim is None:
        return 0
    info.restype = _MallInfo
    kept = int(info().free)
    if kept >= _WORTH_GIVING_BACK:
        trim(0)
    return kept


def _libc(name: str) -> ctypes._NamedFuncPointer | None:
    """Returns a function of the C library; None where that is another than glibc 2.33 or newer."""
    return getattr(ctypes.CDLL(None), name, None)
