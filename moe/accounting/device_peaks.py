"""Peak floating-point rates of devices: from data sheets, else measured."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

Source = Literal["datasheet-dense", "measured", "user"]
MathMode = Literal["bf16", "fp32", "tf32"]

TABLE_DATE = "2026-11"
TRIES, MOST_TRIES = 3, 6
"""Tries of a measurement at the start of a run, and the most of them where they differ."""


@dataclass(frozen=True)
class Peak:
    """Peak of a device in one number format.

    Attributes:
        value: FLOP/s of one device; if measured, the best of the sweep.
        source: ``datasheet-dense`` (without sparsity), ``measured``, or ``user``.
        device: The device's name.
        dtype: The format, such as ``bfloat16``; ``tf32`` if fp32 products run in it.
        detail: Origin of the number, for the report.
        median: If measured, the median at the best size, far below ``value`` on a busy machine; else
            ``value``.
    """

    value: float
    source: Source
    device: str
    dtype: str
    detail: str
    median: float

    @property
    def noisy(self) -> bool:
        """True if the median of the measurement is more than a quarter below its best."""
        return self.median < 0.75 * self.value


# TFLOP/s of one device, dense (sparse marketing numbers are twice these), accumulating in fp32. ``fp32`` is
# without tensor cores, ``tf32`` with. Keys match the full torch.cuda.get_device_name(): a laptop or MIG
# variant has another name and is measured. bf16 follows stas00/ml-engineering and torchtitan, fp32 and tf32
# the makers' data sheets. Uncertain values are left out.
TABLE: Mapping[str, Mapping[MathMode, float]] = {
    r"NVIDIA A100-(SXM4|PCIE|PCIe)-(40|80)GB|NVIDIA A100 80GB PCIe": {"bf16": 312, "fp32": 19.5, "tf32": 156},
    r"NVIDIA H100 PCIe": {"bf16": 756, "fp32": 51, "tf32": 378},
    r"NVIDIA H100 NVL": {"bf16": 835, "fp32": 60},
    r"NVIDIA H100 80GB HBM3": {"bf16": 989, "fp32": 67, "tf32": 494},
    r"NVIDIA H200": {"bf16": 989, "fp32": 67, "tf32": 494},
    r"NVIDIA H20": {"bf16": 148, "fp32": 44, "tf32": 74},
    r"NVIDIA GH200 (480GB|144G HBM3e)": {"bf16": 989, "fp32": 67, "tf32": 494},
    r"NVIDIA B200": {"bf16": 2250},
    r"NVIDIA GB200": {"bf16": 2500},
    r"NVIDIA B300( SXM6 AC)?": {"bf16": 2250},
    r"NVIDIA GB300": {"bf16": 2500},
    r"NVIDIA L40S": {"bf16": 362, "fp32": 91.6, "tf32": 183},
    r"NVIDIA RTX A6000": {"bf16": 154.8, "fp32": 38.7, "tf32": 77.4},
    r"NVIDIA RTX A5000": {"bf16": 111.1, "fp32": 27.8},
    r"NVIDIA GeForce RTX 4090": {"bf16": 165.2, "fp32": 82.6, "tf32": 82.6},
    r"AMD Instinct MI300X( OAM)?": {"bf16": 1307, "fp32": 163.4},
}

# Sizes of square products; the sweep stops at the first that would exceed its time.
SIZES = tuple(2**power for power in range(8, 15))
BATCHES = 5


def math_mode(device: torch.device, dtype: torch.dtype) -> MathMode | None:
    """Returns the table's column for products of this dtype; None without one."""
    if dtype in (torch.bfloat16, torch.float16):
        return "bf16"
    if dtype is torch.float32:
        lowered = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
        return "tf32" if lowered else "fp32"
    return None


def table_peak(name: str, mode: MathMode) -> float | None:
    """Returns the FLOP/s of the device with this name; None if the table lacks it."""
    for pattern, columns in TABLE.items():
        if re.fullmatch(pattern, name) and mode in columns:
            return columns[mode] * 1e12
    return None


def device_name(device: torch.device) -> str:
    """Returns torch's name of an accelerator; for the CPU, its threads and vector width."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    if device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return str(device)


def peak_for(device: torch.device, dtype: torch.dtype) -> Peak:
    """Returns the peak of a device: from the table if listed, else measured now (about a second).

    A single try on a machine that others use can be ten times too low, and utilisations as many times too
    high: the best of several tries counts, of more where they differ. ``source`` and ``detail`` tell which,
    and belong in every report.
    """
    name, mode = device_name(device), math_mode(device, dtype)
    listed = None if mode is None else table_peak(name, mode)
    if listed is None:
        return best_of_tries(lambda: measure_peak_flops(device, dtype))
    shown = "tf32" if mode == "tf32" else str(dtype).removeprefix("torch.")
    detail = f"dense data-sheet peak, table of {TABLE_DATE}"
    return Peak(listed, "datasheet-dense", name, shown, detail, listed)


def best_of_tries(measure: Callable[[], Peak]) -> Peak:
    """Measures several times and returns the best, which says of how many."""
    tries = [measure() for _ in range(TRIES)]
    while len(tries) < MOST_TRIES and _best(tries).noisy:
        tries.append(measure())
    return _best(tries)


def _best(tries: Sequence[Peak]) -> Peak:
    best, median = max(tries, key=lambda peak: peak.value), statistics.median(peak.median for peak in tries)
    return replace(best, detail=f"{best.detail}, best of {len(tries)} tries", median=median)


@torch.no_grad()
def measure_peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> Peak:
    """Measures the peak as the fastest product of square matrices of growing size.

    This is what the machine attains now, with torch's threads: below the theoretical peak (on GPUs by 15 to
    30 %), so that a utilisation against it exceeds one against a data sheet.

    Args:
        device: The device.
        dtype: Dtype of the operands.
        seconds: Approximate time for the sweep; a first product of a size may take longer.

    Raises:
        ValueError: ``seconds`` is not above 0.
    """
    if not seconds > 0:
        raise ValueError(f"seconds={seconds} must be above 0.")
    end = time.perf_counter() + seconds
    best, median, at = 0.0, 0.0, 0
    for size in SIZES:
        expected = 2 * size**3 / best if best else 0.0
        if time.perf_counter() + (BATCHES + 1) * expected > end and best:
            break
        rates = _rates_at(size, device, dtype, seconds / (2 * len(SIZES) * BATCHES))
        if max(rates) > best:
            best, median, at = max(rates), statistics.median(rates), size
    mode = math_mode(device, dtype)
    shown = "tf32" if mode == "tf32" else str(dtype).removeprefix("torch.")
    return Peak(best, "measured", device_name(device), shown, f"best square product, size {at}", median)


def _rates_at(size: int, device: torch.device, dtype: torch.dtype, batch_seconds: float) -> list[float]:
    """Measures the FLOP/s of several batches of products of one size, about ``batch_seconds`` each."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    torch.mm(a, b, out=out)
    once = _time_products(a, b, out, 1)
    repeats = max(1, int(batch_seconds / once))
    return [2 * size**3 * repeats / _time_products(a, b, out, repeats) for _ in range(BATCHES)]


def _time_products(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, repeats: int) -> float:
    _synchronise(out.device)
    start = time.perf_counter()
    for _ in range(repeats):
        torch.mm(a, b, out=out)
    _synchronise(out.device)
    return max(time.perf_counter() - start, 1e-9)


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
