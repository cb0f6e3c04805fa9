"""Joins the pages of a process, so that forking it copies a small table of them instead of a large one."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

_SIZE = 2 << 20
_MADV_COLLAPSE = 25  # of Linux 6.1; an older kernel refuses it, and forks as before


def join_pages() -> None:
    """Asks the kernel for huge pages under the memory that the process has allocated."""
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights, *_, last = line.split()
        is_allocated = rights == "rw-p" and (last == "0" or last == "[heap]")
        begin, end = (int(edge, 16) for edge in span.split("-"))
        begin, end = -(-begin // _SIZE) * _SIZE, end // _SIZE * _SIZE
        if is_allocated and begin < end:
            advise(begin, end - begin, mmap.MADV_HUGEPAGE)
            advise(begin, end - begin, _MADV_COLLAPSE)
