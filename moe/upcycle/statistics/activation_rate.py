"""How often each neuron is among the most active ones.

Letters: F width of the dense network.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from moe.experts.weights import FFNWeights
from moe.upcycle.layer_plan import Draws
from moe.upcycle.statistics.base import LayerBatch
from moe.upcycle.statistics.normalised import MarkingStatistic


class ActivationRate(MarkingStatistic):
    """``[F]`` share of tokens that mark a neuron; it sums to ``top_k``."""

    name = "activation_rate_F"
    defaults: ClassVar[Mapping[str, int]] = MappingProxyType({"top_k": 10})

    def __init__(
        self, ffn: FFNWeights, options: Mapping[str, int], earlier: Mapping[str, Tensor], draws: Draws
    ) -> None:
        super().__init__(ffn, options, earlier, draws)
        device = ffn.up_FD.device
        self.sums = {
            "marks": torch.zeros(ffn.width, dtype=torch.int64, device=device),
            "tokens": torch.zeros((), dtype=torch.int64, device=device),
        }

    def update(self, batch: LayerBatch) -> None:
        """Counts marks."""
        self.sums["marks"] += torch.bincount(self.marks(batch.x_TD).flatten(), minlength=self.ffn.width)
        self.sums["tokens"] += len(batch.x_TD)

    def result(self) -> Tensor:
        """``[F]`` fp64."""
        return (self.sums["marks"].double() / self.sums["tokens"].clamp_min(1)).cpu()
