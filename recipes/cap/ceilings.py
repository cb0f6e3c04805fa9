"""Which peaks a report divides by, and where they are from: measured now, of a table, or the user's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from moe.accounting.device_peaks import TABLE_DATE as FLOPS_DATE
from moe.accounting.device_peaks import device_name, math_mode, table_peak
from moe.accounting.utilisation import Machine
from recipes.tracking.measure_peaks import (
    TABLE_DATE,
    Rate,
    measure_bandwidth,
    measure_products,
    table_bandwidth,
)

Origin = Literal["measured", "table"]
ORIGINS: tuple[Origin, ...] = ("measured", "table")


@dataclass(frozen=True)
class Ceiling:
    """One peak.

    Attributes:
        value: Bytes/s or FLOP/s of one device; None where it is not known.
        source: ``measured``, ``measured (noisy)``, ``datasheet-dense`` or ``user``; None where not known.
        detail: Where it is from, or why it is not known.
        median: Measured: beside the best, which ``value`` is.
    """

    value: float | None
    source: str | None
    detail: str
    median: float | None = None


@dataclass(frozen=True)
class Ceilings:
    """The peaks of a report."""

    bytes_per_s: Ceiling
    flops: Ceiling

    @property
    def machine(self) -> Machine:
        """For the accounting."""
        return Machine(self.bytes_per_s.value, self.flops.value)

    def figures(self) -> dict[str, Any]:
        """For programs."""
        return {"bytes_per_s": vars(self.bytes_per_s).copy(), "flops": vars(self.flops).copy()}


def find_ceilings(
    device: torch.device,
    dtype: torch.dtype,
    origin: Origin = "measured",
    bytes_per_s: float | None = None,
    flops: float | None = None,
) -> Ceilings:
    """The peaks of a device; a user's own go before everything.

    Args:
        device: Where the systems run.
        dtype: Of their products.
        origin: ``measured`` now (about five seconds on a CPU), or of the ``table``, which gives None for a
            device that it does not know: nothing else is put in its place.
        bytes_per_s: The user's own.
        flops: The user's own.
    """
    bandwidth = _user(bytes_per_s) or (_measured_bytes if origin == "measured" else _table_bytes)(
        device, dtype
    )
    compute = _user(flops) or (_measured_flops if origin == "measured" else _table_flops)(device, dtype)
    return Ceilings(bandwidth, compute)


def served_ceilings(
    device: str | None, dtype: torch.dtype, bytes_per_s: float | None = None, flops: float | None = None
) -> Ceilings:
    """The peaks of a device on another machine: the user's own, else the table's by its name."""
    reduced = dtype in (torch.bfloat16, torch.float16)
    if device is None:
        unknown = Ceiling(None, None, "name the server's device with --server-device, or give the peak")
        return Ceilings(_user(bytes_per_s) or unknown, _user(flops) or unknown)
    return Ceilings(
        _user(bytes_per_s) or _listed(table_bandwidth(device), device, TABLE_DATE),
        _user(flops) or _listed(table_peak(device, "bf16") if reduced else None, device, FLOPS_DATE),
    )


def _user(value: float | None) -> Ceiling | None:
    return None if value is None else Ceiling(value, "user", "given by the user")


def _measured_bytes(device: torch.device, dtype: torch.dtype) -> Ceiling:
    rates = measure_bandwidth(device, dtype)
    name = max(rates, key=lambda kernel: rates[kernel].best)
    return _measured(rates[name], f"{name}, the fastest of {', '.join(rates)}; {rates[name].detail}")


def _measured_flops(device: torch.device, dtype: torch.dtype) -> Ceiling:
    rate = measure_products(device, dtype)
    return _measured(rate, rate.detail)


def _measured(rate: Rate, detail: str) -> Ceiling:
    return Ceiling(rate.best, "measured (noisy)" if rate.noisy else "measured", detail, rate.median)


def _table_bytes(device: torch.device, dtype: torch.dtype) -> Ceiling:
    return _listed(table_bandwidth(device_name(device)), device_name(device), TABLE_DATE)


def _table_flops(device: torch.device, dtype: torch.dtype) -> Ceiling:
    mode = math_mode(device, dtype)
    name = device_name(device)
    return _listed(None if mode is None else table_peak(name, mode), name, FLOPS_DATE)


def _listed(value: float | None, device: str, date: str) -> Ceiling:
    if value is None:
        return Ceiling(None, None, f"the table of {date} does not know {device!r} in this dtype")
    return Ceiling(value, "datasheet-dense", f"data sheets, table of {date}, without sparsity")
