"""Ceilings that utilisations are shares of: measured now, from data sheets, or the user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from moe.accounting.device_peaks import TABLE_DATE as FLOPS_DATE
from moe.accounting.device_peaks import Peak, device_name, math_mode, table_peak
from moe.accounting.utilisation import Machine
from recipes.runtime.machine_memory import is_out_of_memory
from recipes.tracking.measure_peaks import (
    TABLE_DATE,
    Rate,
    last_cache_bytes,
    measure_bandwidth,
    measure_products,
    table_bandwidth,
)

T = TypeVar("T")
Origin = Literal["measured", "table"]
ORIGINS: tuple[Origin, ...] = ("measured", "table")
# For the start of a run: larger arrays would take seconds, and memory that the run may not have.
_ROUNDS, _LEAST, _MOST = 3, 64 * 2**20, 256 * 2**20


@dataclass(frozen=True)
class Ceiling:
    """Bytes or FLOPs per second that one device attains at most.

    Attributes:
        value: The rate; None where it is unknown.
        source: ``measured``, ``measured (noisy)``, ``datasheet``, ``datasheet-dense`` or ``user``; None where
            the rate is unknown.
        detail: Origin of the number, or the reason why there is none.
        median: Median of the measurement, whose best is ``value``; None if not measured.
    """

    value: float | None
    source: str | None
    detail: str
    median: float | None = None

    def words(self) -> str:
        """Describes a memory bandwidth for the log of a run."""
        if self.value is None:
            return f"no memory bandwidth ({self.detail})"
        return f"{self.value / 1e9:,.1f} GB/s ({self.source}: {self.detail})"


@dataclass(frozen=True)
class Peaks:
    """Ceilings of the device of one rank in training."""

    flops: Peak | Ceiling
    bandwidth: Ceiling

    def words(self) -> str:
        """Describes both for the log of a run."""
        flops = f"no peak FLOP/s ({self.flops.detail})"
        if self.flops.value is not None:
            rate = f"{self.flops.value / 1e9:,.0f} GFLOP/s a rank"
            flops = f"{rate} ({_marked(self.flops)}: {self.flops.detail})"
        return f"{flops} and of {self.bandwidth.words()}"

    def figures(self) -> dict[str, dict[str, float | str | None]]:
        """Returns the figures for ``summary.json``."""
        named = {"flops": self.flops, "bytes_per_s": self.bandwidth}
        return {
            name: {"value": one.value, "source": _marked(one), "detail": one.detail}
            for name, one in named.items()
        }


def _marked(one: Peak | Ceiling) -> str | None:
    """Returns the source, with a mark where the tries of a measurement differ much."""
    return "measured (noisy)" if isinstance(one, Peak) and one.noisy else one.source


@dataclass(frozen=True)
class Ceilings:
    """Ceilings of a report on inference."""

    bytes_per_s: Ceiling
    flops: Ceiling

    @property
    def machine(self) -> Machine:
        """The same for the accounting."""
        return Machine(self.bytes_per_s.value, self.flops.value)

    def figures(self) -> dict[str, Any]:
        """Returns the figures for programs."""
        return {"bytes_per_s": vars(self.bytes_per_s).copy(), "flops": vars(self.flops).copy()}


def unless_short_of_memory(measure: Callable[[], T]) -> T | Ceiling:
    """Measures for a figure, which is left out where the measurement has no memory."""
    try:
        return measure()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return Ceiling(None, None, "there is not enough memory to measure it")


def bandwidth_for(device: torch.device) -> Ceiling:
    """Returns the bandwidth of a GPU from the table where it is listed; else measures it in half a second.

    The kernels are those of ``tools.peaks`` with fewer rounds, over smaller arrays. All ranks of a machine
    measure at once, so that each has its share. The value is None where arrays beyond the last cache would
    be too large: a share of a cache's bandwidth would be wrong.
    """
    listed = table_bandwidth(device_name(device)) if device.type == "cuda" else None
    if listed is not None:
        return Ceiling(listed, "datasheet", f"data sheets, table of {TABLE_DATE}")
    size = max(_LEAST, 2 * last_cache_bytes(device))
    if size > _MOST:
        reason = f"a last cache of {size / 2**21:.0f} MiB is too large for a short measurement"
        return Ceiling(None, None, reason)
    return _fastest(measure_bandwidth(device, rounds=_ROUNDS, num_bytes=size), f", best of {_ROUNDS} rounds")


def find_ceilings(
    device: torch.device,
    dtype: torch.dtype,
    origin: Origin = "measured",
    bytes_per_s: float | None = None,
    flops: float | None = None,
) -> Ceilings:
    """Returns the ceilings of a device; the user's own take precedence.

    Args:
        device: Device of the systems.
        dtype: Dtype of their products.
        origin: ``measured`` now (about five seconds on a CPU), or ``table``, which gives None for a device
            that it does not list.
        bytes_per_s: The user's own bandwidth.
        flops: The user's own FLOP/s.
    """
    bandwidth, compute = _user(bytes_per_s), _user(flops)
    if origin == "measured":
        return Ceilings(
            bandwidth or _fastest(measure_bandwidth(device, dtype)),
            compute or _tried(measure_products(device, dtype)),
        )
    name, mode = device_name(device), math_mode(device, dtype)
    listed = None if mode is None else table_peak(name, mode)
    return Ceilings(
        bandwidth or _listed(table_bandwidth(name), name, TABLE_DATE),
        compute or _listed(listed, name, FLOPS_DATE),
    )


def served_ceilings(
    device: str | None, dtype: torch.dtype, bytes_per_s: float | None = None, flops: float | None = None
) -> Ceilings:
    """Returns the ceilings of a device on another machine: the user's own, else the table's by its name."""
    bandwidth, compute = _user(bytes_per_s), _user(flops)
    if device is None:
        unknown = Ceiling(None, None, "name the server's device with --server-device, or give the peak")
        return Ceilings(bandwidth or unknown, compute or unknown)
    listed = table_peak(device, "bf16") if dtype in (torch.bfloat16, torch.float16) else None
    return Ceilings(
        bandwidth or _listed(table_bandwidth(device), device, TABLE_DATE),
        compute or _listed(listed, device, FLOPS_DATE),
    )


def _user(value: float | None) -> Ceiling | None:
    return None if value is None else Ceiling(value, "user", "given by the user")


def _fastest(rates: Mapping[str, Rate], more: str = "") -> Ceiling:
    """Returns the rate of the fastest kernel."""
    name = max(rates, key=lambda kernel: rates[kernel].best)
    return _measured(rates[name], f"{name}, the fastest of {', '.join(rates)}; {rates[name].detail}{more}")


def _measured(rate: Rate, detail: str | None = None) -> Ceiling:
    return Ceiling(
        rate.best, "measured (noisy)" if rate.noisy else "measured", detail or rate.detail, rate.median
    )


def _tried(rate: Rate) -> Ceiling:
    return _measured(rate, f"{rate.detail}, best of {rate.rounds} tries")


def _listed(value: float | None, device: str, date: str) -> Ceiling:
    if value is None:
        return Ceiling(None, None, f"the table of {date} does not know {device!r} in this dtype")
    return Ceiling(value, "datasheet-dense", f"data sheets, table of {date}, without sparsity")
