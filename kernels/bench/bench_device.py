"""Measurement on a GPU: a cold L2 cache, the device's own clock, and its frequencies."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable

import torch

#: Fields of nvidia-smi -> key in the figures.
_FIELDS = {
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "clocks.max.sm": "sm_max_mhz",
    "temperature.gpu": "celsius",
    "power.draw": "watts",
}


class ColdTimer:
    """Timer of one run by events of the GPU, after the L2 cache was overwritten.

    The host prepares the first launches while the GPU overwrites its cache. Host time is therefore measured
    only where a run waits for the host or launches too slowly.
    """

    def __init__(self, device: torch.device) -> None:
        """Allocates a buffer of twice the L2 cache."""
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self._device = device
        self._buffer = torch.empty(2 * max(size, 2**20), dtype=torch.int8, device=device)

    def __call__(self, run: Callable[[], object]) -> float:
        """Returns the seconds of one run."""
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self._device)
        self._buffer.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def clocks(device: torch.device) -> dict[str, float | str]:
    """Returns current frequencies, temperature and power, or why they are unknown; empty on a CPU."""
    if device.type != "cuda":
        return {}
    return read_clocks(f"GPU-{torch.cuda.get_device_properties(device).uuid}")


def read_clocks(gpu: str) -> dict[str, float | str]:
    """Returns the same by nvidia-smi's name of a GPU, without figures that it does not report."""
    if shutil.which("nvidia-smi") is None:
        return {"unknown": "nvidia-smi is not on the path"}
    command = [
        "nvidia-smi",
        f"--id={gpu}",
        f"--query-gpu={','.join(_FIELDS)}",
        "--format=csv,noheader,nounits",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as failure:
        return {"unknown": f"nvidia-smi: {failure}"}
    values = done.stdout.strip().split(",")
    if done.returncode != 0 or len(values) != len(_FIELDS):
        return {"unknown": f"nvidia-smi: {(done.stderr or done.stdout).strip() or done.returncode}"}
    found: dict[str, float | str] = {}
    for key, value in zip(_FIELDS.values(), values, strict=True):
        try:
            found[key] = float(value)
        except ValueError:
            continue
    return found
