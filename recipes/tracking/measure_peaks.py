"""Measures the peak bandwidth and the peak FLOP/s of a machine, or looks them up in data sheets.

The kernels are those of STREAM (J. McCalpin), counted as STREAM does: copy moves two words per element,
triad three; the lines that a CPU reads before it writes them are not credited. Decoding mostly reads, so a
norm over one array and a matrix times a vector are measured as well. Arrays are several times larger than the
last cache.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.bench.timing import interleave
from moe.accounting.device_peaks import measure_peak_flops

TABLE_DATE = "2026-11"
_MIB = 2**20
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
# Assumed if the system does not report the size of the last cache.
_USUAL_CACHE = 64 * _MIB
_COLUMNS = 8192

# GB/s of one device, as the makers' data sheets and stas00/ml-engineering list them. Keys match the whole of
# torch.cuda.get_device_name(); uncertain values are left out.
BANDWIDTH: Mapping[str, float] = {
    r"NVIDIA A100-(SXM4|PCIE|PCIe)-40GB": 1555,
    r"NVIDIA A100-SXM4-80GB": 2039,
    r"NVIDIA A100 80GB PCIe|NVIDIA A100-PCIE-80GB": 1935,
    r"NVIDIA H100 PCIe": 2000,
    r"NVIDIA H100 NVL": 3900,
    r"NVIDIA H100 80GB HBM3": 3350,
    r"NVIDIA H200": 4800,
    r"NVIDIA B200": 8000,
    r"NVIDIA GB200": 8000,
    r"NVIDIA L40S": 864,
    r"NVIDIA RTX A6000": 768,
    r"NVIDIA RTX A5000": 768,
    r"NVIDIA GeForce RTX 4090": 1008,
    r"AMD Instinct MI300X( OAM)?": 5300,
}


@dataclass(frozen=True)
class Rate:
    """Bytes or FLOPs per second of one kernel.

    Attributes:
        best: Best of all rounds.
        median: Median of all rounds.
        p10: Tenth percentile.
        p90: Ninetieth percentile.
        rounds: Number of rounds.
        detail: Description of the kernel.
    """

    best: float
    median: float
    p10: float
    p90: float
    rounds: int
    detail: str

    @property
    def noisy(self) -> bool:
        """True when the median is over a quarter below the best: the machine was busy otherwise."""
        return self.median < 0.75 * self.best


def rate_of(values: Sequence[float], detail: str) -> Rate:
    """Returns best, median and spread of the rates of several rounds."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return Rate(
        best=ordered[-1],
        median=statistics.median(ordered),
        p10=ordered[round(0.1 * last)],
        p90=ordered[round(0.9 * last)],
        rounds=len(ordered),
        detail=detail,
    )


def table_bandwidth(name: str) -> float | None:
    """Returns the bytes/s of the device with this name; None when the table does not list it."""
    found = next((value for pattern, value in BANDWIDTH.items() if re.fullmatch(pattern, name)), None)
    return None if found is None else found * 1e9


def last_cache_bytes(device: torch.device, caches: Path = _CACHES) -> int:
    """Returns the bytes of the last cache before memory; 64 MiB where the system does not report them."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [path.read_text().strip() for path in caches.glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    known = [int(size[:-1]) * units[size[-1]] for size in sizes if re.fullmatch(r"\d+[KM]", size)]
    return max(known, default=_USUAL_CACHE)


@torch.no_grad()
def measure_bandwidth(
    device: torch.device, dtype: torch.dtype = torch.float32, rounds: int = 10, num_bytes: int | None = None
) -> dict[str, Rate]:
    """Measures the bytes/s of ``read``, ``copy``, ``triad`` and ``gemv``, with interleaved rounds.

    Args:
        device: The device, with as many threads as torch has.
        dtype: Dtype of the matrix and vector of ``gemv``; the others use fp32.
        rounds: Timed rounds of each, after a warm-up round.
        num_bytes: Bytes of an array; None for four times the last cache, at least 64 MiB (256 on a GPU).

    Raises:
        ValueError: ``rounds`` is below 1, or an array would hold less than a row.
    """
    least = 64 * _MIB if device.type == "cpu" else 256 * _MIB
    size = max(least, 4 * last_cache_bytes(device)) if num_bytes is None else num_bytes
    elements = size // 4 // _COLUMNS * _COLUMNS
    if rounds < 1 or elements < _COLUMNS:
        raise ValueError(f"rounds={rounds} and num_bytes={size} must be at least 1 and {4 * _COLUMNS}.")
    one, two, out = (torch.full((elements,), value, device=device) for value in (1.0, 2.0, 0.0))
    rows = size // dtype.itemsize // _COLUMNS
    matrix = torch.ones(rows, _COLUMNS, device=device, dtype=dtype)
    vector = torch.ones(1, _COLUMNS, device=device, dtype=dtype)
    work: dict[str, tuple[int, Callable[[], object]]] = {
        "read": (4 * elements, lambda: torch.linalg.vector_norm(one)),
        "copy": (8 * elements, lambda: out.copy_(one)),
        "triad": (12 * elements, lambda: torch.add(one, two, alpha=3.0, out=out)),
        "gemv": (rows * _COLUMNS * dtype.itemsize, lambda: torch.nn.functional.linear(vector, matrix)),
    }
    seconds = interleave(
        {name: run for name, (_, run) in work.items()}, rounds, 1, lambda: synchronise(device)
    )
    words = f"arrays of {size / _MIB:.0f} MiB"
    shown = dict.fromkeys(work, words) | {"gemv": f"{words}, {_short(dtype)}"}
    return {
        name: rate_of([count / took for took in seconds[name]], shown[name])
        for name, (count, _) in work.items()
    }


def measure_products(device: torch.device, dtype: torch.dtype, rounds: int = 3, seconds: float = 0.3) -> Rate:
    """Measures the FLOP/s of square products, at the best size of each sweep.

    Args:
        device: The device, with as many threads as torch has.
        dtype: Dtype of the operands.
        rounds: Number of sweeps.
        seconds: Approximate seconds of a sweep.
    """
    sweeps = [measure_peak_flops(device, dtype, seconds) for _ in range(rounds)]
    best = max(sweeps, key=lambda sweep: sweep.value)
    found = rate_of([sweep.median for sweep in sweeps], f"{best.detail}, {best.dtype}")
    return Rate(best.value, found.median, found.p10, best.value, rounds, found.detail)


def measure_machine(
    device: torch.device, dtypes: Sequence[torch.dtype], rounds: int = 10, seconds: float = 0.3
) -> dict[str, dict[str, Rate]]:
    """Measures ``bytes_per_s`` by kernel and ``flops`` by dtype, for ``python -m tools.peaks``."""
    return {
        "bytes_per_s": measure_bandwidth(device, dtypes[0], rounds),
        "flops": {_short(dtype): measure_products(device, dtype, 3, seconds) for dtype in dtypes},
    }


def figures_of(rates: Mapping[str, Rate]) -> dict[str, Any]:
    """Returns the rates for programs."""
    return {name: {**vars(rate), "noisy": rate.noisy} for name, rate in rates.items()}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def synchronise(device: torch.device) -> None:
    """Waits until the device is idle; a CPU always is."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
