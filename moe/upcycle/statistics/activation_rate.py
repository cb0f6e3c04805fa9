"""Rate at which each neuron is among the most active ones.

Letters: F width of the dense network.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from moe.upcycle.statistics.base import LayerBatch
from moe.upcycle.statistics.normalised import MarkingStatistic


class ActivationRate(MarkingStatistic):
    """Share of tokens that mark each neuron, ``[F]``; it sums to ``top_k``."""

    name = "activation_rate_F"
    defaults: ClassVar[Mapping[str, int]] = MappingProxyType({"top_k": 10})

    def start(self) -> None:
        """See `Statistic.start`."""
        self.sums = self.zeros_per_token("marks", self.ffn.width, dtype=torch.int64)

    def update(self, batch: LayerBatch) -> None:
        """Counts marks."""
        self.sums["marks"] += torch.bincount(self.marks(batch.x_TD).flatten(), minlength=self.ffn.width)
        self.sums["tokens"] += len(batch.x_TD)

    def result(self) -> Tensor:
        """Returns ``[F]`` fp64."""
        return (self.sums["marks"].double() / self.sums["tokens"].clamp_min(1)).cpu()
