"""Utilisation of the hardware by a run.

Unmeasured values are None, never 0. Several passes give one ratio of sums: the mean of their ratios would
weigh short passes like long ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from moe.accounting.bytes import BitWidths, full_step_bytes, step_bytes
from moe.accounting.distinct import DistinctExperts
from moe.accounting.flops import all_experts
from moe.accounting.layers import ModelShape
from moe.accounting.passes import Batch, pass_flops
from moe.accounting.tiers import Tier

Metric = Literal["S-MBU", "MBU", "S-MFU", "MFU"]

_COMPUTE = (
    "the peak is of another device or dtype (or was measured while the machine was busy), tokens are "
    "counted twice, or the clock does not wait for the device."
)
_BANDWIDTH = (
    "the peak is of another device (or was measured while the machine was busy), weights stay in a cache "
    "between passes, or the clock does not wait for the device."
)
_ASSUMED = " MBU counts every expert as read in every pass; S-MBU counts those that are."
CAUSES: dict[Metric, str] = {
    "S-MBU": _BANDWIDTH,
    "MBU": _BANDWIDTH + _ASSUMED,
    "S-MFU": _COMPUTE,
    "MFU": _COMPUTE,
}


def mfu(flops_per_token: float, tokens_per_s: float, peak_flops: float, world_size: int = 1) -> float:
    """Computes the model FLOPs utilisation: FLOPs of the model over those of the devices in that time.

    Source: A. Chowdhery et al., "PaLM", arXiv:2204.02311, appendix B. Recomputation is not work done.

    Args:
        flops_per_token: In training, `moe.accounting.flops.training_flops_per_token`, whose convention
            carries over to the result.
        tokens_per_s: Tokens per second of all devices together.
        peak_flops: FLOP/s of one device, see `moe.accounting.device_peaks.peak_for`.
        world_size: Number of devices.

    Returns:
        A share, normally in [0, 1]. Above 1 it warns, with the usual causes.

    Raises:
        ValueError: A peak or number of devices that is not above 0, or a negative rate.
    """
    if not peak_flops > 0 or world_size < 1:
        raise ValueError(
            f"peak_flops={peak_flops} and world_size={world_size} must be above 0. Measure the peak."
        )
    if not flops_per_token >= 0 or not tokens_per_s >= 0:
        raise ValueError(
            f"flops_per_token={flops_per_token}, tokens_per_s={tokens_per_s} must not be negative."
        )
    return _warned("MFU", flops_per_token * tokens_per_s / (peak_flops * world_size))


def share_of_peak(work: float, seconds: float, peak: float | None, devices: int = 1) -> float | None:
    """Computes work over the devices' capacity in that time, for callers that warn by themselves.

    Returns:
        The share; None if the peak is unknown, never 0. Above 1 see `above_one`.

    Raises:
        ValueError: Work is negative, or time, peak or devices are not above 0.
    """
    if (peak is not None and not peak > 0) or devices < 1 or not seconds > 0 or not work >= 0:
        raise ValueError(
            f"work={work} must not be negative and seconds={seconds}, peak={peak}, devices={devices} must be "
            "above 0. An unknown peak is None."
        )
    return None if peak is None else work / (seconds * peak * devices)


def above_one(metric: Metric, share: float) -> str | None:
    """Returns a warning with the likely cause for a share above 1; else None."""
    return f"{metric} is {share:.2f}, above 1: {CAUSES[metric]}" if share > 1 else None


def utilisation(
    metric: Metric,
    work: Sequence[float | None],
    seconds: Sequence[float | None],
    peak: float | None,
    devices: int = 1,
) -> float | None:
    """Computes the work of all passes over the devices' capacity in their time: equation 6 of MoE-CAP.

    Args:
        metric: The metric, for the warning.
        work: Bytes or FLOPs of every pass.
        seconds: Time of every pass.
        peak: Bytes/s or FLOP/s of one device; None if unknown.
        devices: Number of devices.

    Returns:
        A share, normally in [0, 1]; above 1 it warns with the likely causes. None without passes, with an
        unknown peak, or if a pass was not fully measured.

    Raises:
        ValueError: The numbers of passes differ, work is negative, or time, peak or devices are not above 0.
    """
    if len(work) != len(seconds):
        raise ValueError(f"{len(work)} passes have work and {len(seconds)} have a time.")
    done = [value for value in work if value is not None]
    took = [value for value in seconds if value is not None]
    if any(not value >= 0 for value in done) or any(not value > 0 for value in took):
        raise ValueError(f"work={done[:4]} must not be negative and seconds={took[:4]} must be above 0.")
    if (peak is not None and not peak > 0) or devices < 1:
        raise ValueError(f"peak={peak} and devices={devices} must be above 0. An unknown peak is None.")
    if peak is None or not work or len(done) < len(work) or len(took) < len(seconds):
        return None
    return _warned(metric, sum(done) / (sum(took) * peak * devices))


def practical_peak(work: float, seconds: float, share: float) -> float:
    """Computes the data-sheet rate that a device needs to do this work in this time at a utilisation.

    Source: Y. Jiang et al., "MoE-CAP", arXiv:2412.07067, equations 7 and 8.

    Raises:
        ValueError: Time or share are not above 0.
    """
    if not seconds > 0 or not share > 0:
        raise ValueError(f"seconds={seconds} and share={share} must be above 0.")
    return work / seconds / share


@dataclass(frozen=True)
class Pass:
    """Measured forward pass.

    Attributes:
        batch: Its sequences.
        seconds: Its time; None if not measured.
        distinct: Distinct experts that it used; None if unknown.
    """

    batch: Batch
    seconds: float | None
    distinct: DistinctExperts | None


@dataclass(frozen=True)
class Utilisations:
    """Shares of the devices' peaks; None if not measured.

    Attributes:
        s_mbu: Bandwidth of all touched weights and of the cache, read and written.
        s_mbu_strict: Bandwidth by equation 4 to the letter: no router, norms, embedding or head.
        mbu: Bandwidth as if every expert were read.
        s_mfu: Compute that tokens use, with the head.
        s_mfu_strict: Compute by equation 5 to the letter: no head.
        mfu: Compute as if every token used every expert.
        distinct_source: Origin of the distinct experts; None if unknown or different between passes.
    """

    s_mbu: float | None
    s_mbu_strict: float | None
    mbu: float | None
    s_mfu: float | None
    s_mfu_strict: float | None
    mfu: float | None
    distinct_source: str | None


@dataclass(frozen=True)
class Machine:
    """Machine that the passes ran on.

    Attributes:
        bytes_per_s: Peak memory bandwidth of one device; None if unknown.
        flops: Peak dense FLOP/s of one device in the used dtype; None if unknown.
        devices: Number of devices.
        tiers: Memories of weights and cache, if several.
    """

    bytes_per_s: float | None
    flops: float | None
    devices: int = 1
    tiers: tuple[Tier, ...] = ()


def utilisations(
    shape: ModelShape, passes: Iterable[Pass], machine: Machine, bits: BitWidths | None = None
) -> Utilisations:
    """Computes all utilisations of a run of passes, each a ratio of sums, see `utilisation`."""
    ran = tuple(passes)
    seconds = [one.seconds for one in ran]
    touched = [
        None if one.distinct is None else step_bytes(shape, one.batch, one.distinct.per_layer, bits)
        for one in ran
    ]
    dense = all_experts(shape)
    sources = {None if one.distinct is None else one.distinct.source for one in ran}

    def bandwidth(metric: Metric, work: Sequence[float | None]) -> float | None:
        return utilisation(metric, work, seconds, machine.bytes_per_s, machine.devices)

    def compute(metric: Metric, work: Sequence[float | None]) -> float | None:
        return utilisation(metric, work, seconds, machine.flops, machine.devices)

    return Utilisations(
        s_mbu=bandwidth("S-MBU", [None if step is None else step.complete for step in touched]),
        s_mbu_strict=bandwidth("S-MBU", [None if step is None else step.strict for step in touched]),
        mbu=bandwidth("MBU", [full_step_bytes(shape, one.batch, bits).complete for one in ran]),
        s_mfu=compute("S-MFU", [pass_flops(shape, one.batch) for one in ran]),
        s_mfu_strict=compute("S-MFU", [pass_flops(shape, one.batch, strict=True) for one in ran]),
        mfu=compute("MFU", [pass_flops(dense, one.batch) for one in ran]),
        distinct_source=sources.pop() if len(sources) == 1 else None,
    )


def _warned(metric: Metric, share: float) -> float:
    if warning := above_one(metric, share):
        warnings.warn(warning, stacklevel=3)
    return share
