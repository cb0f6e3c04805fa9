"""Runs ``train.py`` on a simulated slow disk.

Usage: ``torchrun -m recipes.studies.chaos.slow_disk MIB_S [OPTION=VALUE ...]``.

Writing a checkpoint's tensors waits as long as a disk of that speed would take, on each rank by itself. Fault
injection for `tools.chaos` and `tools.bench_save`; no run that does not start here is touched by it.
"""

from __future__ import annotations

import sys
import time
from typing import BinaryIO

from recipes.runtime import safetensors_codec

_PIECE_S = 0.02


def slow_down(mib_s: float) -> None:
    """Limits this process to writing checkpoint tensors at ``mib_s`` MiB per second."""
    append = safetensors_codec.append

    def slowly(file: BinaryIO, data: memoryview, crc: int) -> int:
        piece = max(1, int(mib_s * 2**20 * _PIECE_S))
        for start in range(0, len(data), piece):
            began = time.perf_counter()
            part = data[start : start + piece]
            crc = append(file, part, crc)
            file.flush()
            time.sleep(max(0.0, len(part) / (mib_s * 2**20) - (time.perf_counter() - began)))
        return crc

    safetensors_codec.append = slowly


if __name__ == "__main__":
    from recipes.launch import end_process, main

    slow_down(float(sys.argv[1]))
    end_process(main(sys.argv[2:]))
