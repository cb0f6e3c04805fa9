"""Low-rank factors of the experts' weights: LoRA (E. Hu et al., arXiv 2106.09685), for each expert.

``W x + (alpha / r) B (A x)``: W is frozen, A and B train. A is drawn and B is zero, so that the MoE at first
computes the same as without them.

Letters: E experts, D model width, F expert width, U = 2F when gated, else F; r rank; I, O width in and out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moe.routing.draws import seeded_generator

#: Name of a stack of weights to the names of its factors A and B.
FACTORS: Mapping[str, tuple[str, str]] = {
    "w_up_EUD": ("lora_a_up_ErD", "lora_b_up_EUr"),
    "w_down_EDF": ("lora_a_down_ErF", "lora_b_down_EDr"),
}
#: Factors that are drawn; the others begin as zeros.
DRAWN = frozenset(a for a, _ in FACTORS.values())
FACTOR_NAMES = frozenset(name for pair in FACTORS.values() for name in pair)


def factor_shapes(w_up_EUD: Tensor, w_down_EDF: Tensor, rank: int) -> dict[str, tuple[int, int, int]]:
    """Returns the shape of every factor by name."""
    found: dict[str, tuple[int, int, int]] = {}
    for name, weight in (("w_up_EUD", w_up_EUD), ("w_down_EDF", w_down_EDF)):
        count, out, width = weight.shape
        a, b = FACTORS[name]
        found |= {a: (count, rank, width), b: (count, out, rank)}
    return found


def drawn_factor(seed: int, layer: int, name: str, expert: int, shape: tuple[int, int]) -> Tensor:
    """Draws one expert's A, the same on every rank that holds it.

    It is normal with variance 1 / I, so that ``A x`` has the magnitude of x.

    Args:
        seed: Seed of the run.
        layer: Index of the block.
        name: Name of the factor, one of `DRAWN`.
        expert: Index among all experts of the layer.
        shape: ``(r, I)``.
    """
    generator = seeded_generator(seed, "lora", layer, name, expert)
    factor_rI: Tensor = torch.randn(shape, generator=generator) * shape[1] ** -0.5
    return factor_rI


def merged(weight_EOI: Tensor, a_ErI: Tensor, b_EOr: Tensor, scale: float) -> Tensor:
    """Returns ``W + scale * B A`` in at least fp32, which computes the same as W with its factors."""
    wide = torch.promote_types(weight_EOI.dtype, torch.float32)
    return torch.baddbmm(weight_EOI.to(wide), b_EOr.to(wide), a_ErI.to(wide), alpha=scale)
