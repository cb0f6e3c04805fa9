"""Entropy of the experts' load in a forward pass, for reports before training.

Letters: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe.layer import MoELayer
from moe.types import Routing


@contextmanager
def load_entropies(layers: Sequence[MoELayer]) -> Iterator[list[float]]:
    """Collects, while open, the `load_entropy` of each forward pass of each layer, in order."""
    found: list[float] = []

    def keep(module: nn.Module, args: tuple[Any, ...], routing: Routing) -> None:
        found.append(load_entropy(routing))

    handles = [layer.router.register_forward_hook(keep) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def load_entropy(routing: Routing) -> float:
    """Computes the entropy of the load over that of even load: 1 is balanced, 0 is one expert for all."""
    used_TK = torch.ones_like(routing.weights_TK, dtype=torch.bool)
    if routing.slot_mask_TK is not None:
        used_TK = routing.slot_mask_TK
    counts_E = torch.bincount(routing.expert_ids_TK[used_TK], minlength=routing.num_experts).double()
    return relative_entropy(counts_E)


def relative_entropy(counts_E: Tensor) -> float:
    """Computes the entropy of ``[E]`` counts or probabilities over ln E; 1 for a single expert."""
    if len(counts_E) == 1:
        return 1.0
    share_E = counts_E / counts_E.sum().clamp_min(1e-30)
    return float(torch.special.entr(share_E).sum()) / math.log(len(counts_E))
