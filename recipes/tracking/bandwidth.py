"""The memory bandwidth of a rank's device, fast enough for every start of a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe.accounting.device_peaks import Peak, device_name
from recipes.tracking.measure_peaks import TABLE_DATE, last_cache_bytes, measure_bandwidth, table_bandwidth

_ROUNDS = 3
_LEAST = 64 * 2**20
_MOST = 256 * 2**20  # of an array: more would take seconds, and memory that the run may not have


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second of one device.

    Attributes:
        value: None where it is not known.
        source: ``datasheet``, ``measured``, ``measured (noisy)``, or None.
        detail: What was run, where the number is from, or why there is none.
    """

    value: float | None
    source: str | None
    detail: str

    def words(self) -> str:
        """For a person."""
        if self.value is None:
            return f"no memory bandwidth ({self.detail})"
        return f"{self.value / 1e9:,.1f} GB/s ({self.source}: {self.detail})"


@dataclass(frozen=True)
class Peaks:
    """What utilisations of training are shares of, of one rank's device."""

    flops: Peak
    bandwidth: Bandwidth

    def figures(self) -> dict[str, dict[str, float | str | None]]:
        """For ``summary.json``."""
        flops, moved = self.flops, self.bandwidth
        return {
            "flops": {"value": flops.value, "source": flops.source, "detail": flops.detail},
            "bytes_per_s": {"value": moved.value, "source": moved.source, "detail": moved.detail},
        }


def bandwidth_for(device: torch.device) -> Bandwidth:
    """Of a GPU from the table when that knows it; else measured now, in about half a second.

    The kernels are those of ``tools.peaks`` with fewer rounds, over smaller arrays; all ranks of a machine
    measure at once, so that each has its share. It is None where arrays beyond the last cache would be too
    large for that: a share of a cache's bandwidth would be wrong.
    """
    listed = table_bandwidth(device_name(device)) if device.type == "cuda" else None
    if listed is not None:
        return Bandwidth(listed, "datasheet", f"data sheets, table of {TABLE_DATE}")
    size = max(_LEAST, 2 * last_cache_bytes(device))
    if size > _MOST:
        reason = f"a last cache of {size / 2**21:.0f} MiB is too large for a short measurement"
        return Bandwidth(None, None, reason)
    rates = measure_bandwidth(device, rounds=_ROUNDS, num_bytes=size)
    name = max(rates, key=lambda kernel: rates[kernel].best)
    best = rates[name]
    words = f"{name}, the fastest of {', '.join(rates)}; {best.detail}; {_ROUNDS} rounds"
    return Bandwidth(best.best, "measured (noisy)" if best.noisy else "measured", words)
