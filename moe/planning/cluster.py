"""Properties of a cluster that determine memory and time of a training step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from moe.accounting.device_peaks import table_peak
from moe.errors import ConfigError

Precision = Literal["bf16", "fp8", "mxfp8", "nvfp4"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

# Watts per FLOP/s of bf16 of A100, H100 and GB200, by the number of narrower kinds of products.
_FIRST_WATTS: Mapping[int, float] = {0: 400 / 312e12, 1: 700 / 989e12, 2: 1200 / 2500e12}
_TERA, _GIGA, _GIBI = 1e12, 1e9, 2**30


@dataclass(frozen=True)
class Gpu:
    """One GPU with its links.

    Attributes:
        name: Its name in torch, the key of `moe.accounting.device_peaks.TABLE`.
        memory: Bytes.
        memory_bandwidth: Bytes/s of its memory.
        nvlink: Bytes/s to the other GPUs of its domain, in one direction.
        network: Bytes/s of its share of the network, in one direction.
        domain: GPUs of an NVLink domain.
        bf16: FLOP/s of dense 16-bit products, from the table.
        low: FLOP/s of dense products by number of bits: 8 and 4, if the GPU has units for them.
        power: Watts that it may draw per FLOP/s of its peak, relative to the first GPU of its generation: the
            headroom of its clock under load.
    """

    name: str
    memory: float
    memory_bandwidth: float
    nvlink: float
    network: float
    domain: int
    bf16: float
    low: Mapping[int, float]
    power: float

    def peak(self, precision: Precision) -> float:
        """Returns the FLOP/s of dense products.

        Raises:
            ConfigError: The GPU has no units for them.
        """
        bits = bits_of(precision)
        if bits == 16:
            return self.bf16
        if bits not in self.low:
            rule = f"{self.name} has no units for products of {bits} bits"
            raise ConfigError.one("--precision", precision, rule, "Choose bf16, or another GPU.")
        return self.low[bits]


def bits_of(precision: Precision) -> int:
    """Returns the bits of the operands of products."""
    return {"bf16": 16, "fp8": 8, "mxfp8": 8, "nvfp4": 4}[precision]


def _gpu(
    name: str, memory: float, bandwidth: float, links: tuple[float, float, int], *, watts: float, **low: float
) -> Gpu:
    nvlink, network, domain = links
    bf16 = table_peak(name, "bf16")
    assert bf16 is not None, name
    return Gpu(
        name,
        memory * _GIBI,
        bandwidth * _GIGA,
        nvlink * _GIGA,
        network * _GIGA,
        domain,
        bf16,
        {int(key[3:]): value * _TERA for key, value in low.items()},
        watts / bf16 / _FIRST_WATTS[len(low)],
    )


# Memory, GB/s, GB/s in one direction, from the makers' data sheets; dense TFLOP/s (half of the sparse
# marketing numbers). The sheets' GB of memory are taken as 2^30 bytes. Network rates are those of the makers'
# reference systems, per GPU. Flags describe other clusters.
GPUS: Mapping[str, Gpu] = {
    "a100": _gpu("NVIDIA A100-SXM4-80GB", 80, 2039, (300, 25, 8), watts=400),
    "h100": _gpu("NVIDIA H100 80GB HBM3", 80, 3350, (450, 50, 8), watts=700, low8=1979),
    "h200": _gpu("NVIDIA H200", 141, 4800, (450, 50, 8), watts=700, low8=1979),
    "b200": _gpu("NVIDIA B200", 180, 8000, (900, 50, 8), watts=1000, low8=4500, low4=9000),
    "gb200": _gpu("NVIDIA GB200", 186, 8000, (900, 50, 72), watts=1200, low8=5000, low4=10000),
    "b300": _gpu("NVIDIA B300", 268, 8000, (900, 100, 8), watts=1100, low8=4500, low4=13500),
    "gb300": _gpu("NVIDIA GB300", 277, 8000, (900, 100, 72), watts=1400, low8=5000, low4=15000),
}


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind.

    Attributes:
        gpu: Properties of every GPU.
        gpus: Number of GPUs.
    """

    gpu: Gpu
    gpus: int

    def bandwidth(self, ranks: int, stride: int) -> float:
        """Returns the bytes/s per GPU and direction in a ring over a group of every ``stride``-th rank.

        Inside a domain it is NVLink. Beyond it, as many parallel rings run as the group has members in a
        domain, each over its own network link.
        """
        members = max(1, self.gpu.domain // stride)
        if ranks <= members:
            return self.gpu.nvlink
        return min(self.gpu.nvlink, min(ranks, members) * self.gpu.network)
