"""Shapes of published models, routings, and the least time that a GPU could take.

Letters: T tokens, D model width, E experts, K slots a token, R routed rows, F expert width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Gated experts of one layer.

    Attributes:
        name: Name in tables.
        experts: E.
        slots: K.
        width: D.
        expert_width: F.
    """

    name: str
    experts: int
    slots: int
    width: int
    expert_width: int

    def divided(self, by: int) -> Shape:
        """Returns the same experts with both widths divided, at a size that a CPU can run."""
        if by == 1:
            return self
        return replace(
            self,
            name=f"{self.name}/{by}",
            width=max(16, self.width // by),
            expert_width=max(16, self.expert_width // by),
        )


#: Shapes by command-line name. Sigma-MoE-Tiny's widths are inferred from its size, not published.
SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        shape.name: shape
        for shape in (
            Shape("olmoe", 64, 8, 2048, 1024),
            Shape("mixtral", 8, 2, 4096, 14336),
            Shape("qwen3-30b", 128, 8, 2048, 768),
            Shape("deepseek-v3", 256, 8, 7168, 2048),
            Shape("sigma-tiny", 96, 1, 1536, 768),
        )
    }
)
ROUTINGS = ("balanced", "zipf", "hot")


def expert_ids(shape: Shape, tokens: int, routing: str, seed: int = 0) -> Tensor:
    """Draws distinct experts for each token, ``[T, K]``.

    Args:
        shape: Experts and slots.
        tokens: T.
        routing: ``balanced``: every expert has as many rows, up to one; ``zipf``: expert e is drawn in
            proportion to ``1 / (e + 1)``; ``hot``: every token has expert 0, the rest is uniform.
        seed: Seed of the draw.
    """
    E, K = shape.experts, shape.slots
    generator = torch.Generator().manual_seed(seed)
    if routing == "balanced":
        order_T = torch.randperm(tokens, generator=generator)
        return (order_T[:, None] * K + torch.arange(K)) % E
    rate_E = torch.ones(E) if routing == "hot" else 1 / torch.arange(1, E + 1)
    # The K smallest of independent exponential times are a draw without replacement at these rates.
    time_TE = torch.empty(tokens, E).exponential_(generator=generator) / rate_E
    if routing == "hot":
        time_TE[:, 0] = 0
    return time_TE.topk(K, largest=False).indices


@dataclass(frozen=True)
class Roof:
    """Limits of a GPU.

    Attributes:
        flops: Operations per second, in the dtype of the experts.
        bandwidth: Bytes per second.
    """

    flops: float
    bandwidth: float


#: An H200 in bf16.
H200 = Roof(790e12, 4.3e12)


def floor_seconds(shape: Shape, tokens: int, roof: Roof, *, backward: bool) -> float:
    """Sums over kernels the longer of arithmetic and traffic, if each moves every tensor once.

    Args:
        shape: The layer.
        tokens: T.
        roof: Limits of the GPU.
        backward: Whether the backward pass counts too.
    """
    T, R, D, F = tokens, tokens * shape.slots, shape.width, shape.expert_width
    up, down = 2 * shape.experts * D * F, shape.experts * D * F
    product = 2 * R * D * F
    gather_and_sum = (R * D + T * D, 0)
    # (elements moved, operations) of each kernel.
    kernels = [
        (T * D + up + 2 * R * F + R * F, 2 * product),
        (R * F + down + R * D, product),
        gather_and_sum,
    ]
    if backward:
        kernels += [
            (T * D + down + 2 * R * F + 2 * R * F + R * F, product),
            (T * D + R * F + down, product),
            (2 * R * F + up + R * D, 2 * product),
            (T * D + 2 * R * F + up, 2 * product),
            gather_and_sum,
        ]
    return sum(max(2 * moved / roof.bandwidth, done / roof.flops) for moved, done in kernels)
