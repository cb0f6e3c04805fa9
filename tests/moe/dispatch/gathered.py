"""The statistics that a method asks for, of a network on random tokens.

Letters: T tokens, D model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe.experts.weights import FFNWeights
from moe.upcycle.base import UpcycleMethod
from moe.upcycle.layer_plan import Draws
from moe.upcycle.statistics.base import LayerBatch
from moe.upcycle.statistics.layer_statistics import LayerStatistics, Wanted


def random_batch(ffn: FFNWeights, num_tokens: int = 64, seed: int = 8) -> LayerBatch:
    """Random tokens with random gradients of the network's output."""
    generator = torch.Generator().manual_seed(seed)
    x_TD, grad_TD = torch.randn(2, num_tokens, ffn.model_width, generator=generator).to(ffn.up_FD.dtype)
    return LayerBatch(ffn, x_TD, torch.arange(num_tokens), grad_TD)


def gathered(method: UpcycleMethod[Any], ffn: FFNWeights) -> dict[str, Tensor]:
    """By name, in as many passes as it takes."""
    with torch.no_grad():
        wanted = Wanted(tuple(method.statistics), method.statistic_options)
        layer = LayerStatistics(ffn, wanted, Draws(seed=1, layer=0))
        for number in range(len(layer.passes)):
            layer.begin(number)
            layer.update(random_batch(ffn))
            layer.finish(number)
        return layer.asked_for()
