"""Inputs of the dense network, and where they cluster.

Letters: T tokens, D model width, E clusters.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from moe.experts.weights import FFNWeights
from moe.upcycle.clustering import balanced_kmeans
from moe.upcycle.layer_plan import Draws, FFNShape
from moe.upcycle.statistics.base import LayerBatch, Statistic
from moe.upcycle.statistics.reservoir import ReservoirStatistic


class Inputs(ReservoirStatistic):
    """``[T, D]`` fp32 inputs of a bounded sample of tokens."""

    name = "inputs_TD"
    defaults: ClassVar[Mapping[str, int]] = MappingProxyType({"num_tokens": 8192})

    def __init__(
        self, ffn: FFNWeights, options: Mapping[str, int], earlier: Mapping[str, Tensor], draws: Draws
    ) -> None:
        super().__init__(ffn, options, earlier, draws)
        self.start(ffn.model_width, torch.float32)

    @classmethod
    def num_bytes(cls, shape: FFNShape, options: Mapping[str, int]) -> int:
        """Rows of fp32 and the number of each token."""
        return options["num_tokens"] * (4 * shape.model_width + 8)

    def update(self, batch: LayerBatch) -> None:
        """Offers a batch to the sample."""
        self.keep(batch.x_TD, batch.index_T)


class Centroids(Statistic):
    """``[E, D]`` fp32 centroids of a balanced k-means of the sampled inputs (LLaMA-MoE v2's router rows)."""

    name = "centroids_ED"
    after: ClassVar[tuple[str, ...]] = ("inputs_TD",)
    reads_text = False
    defaults: ClassVar[Mapping[str, int]] = MappingProxyType({"num_clusters": 8})

    def result(self) -> Tensor:
        """Clusters the sample."""
        inputs_TD = self.earlier["inputs_TD"]
        generator = self.draws.generator("centroids")
        return balanced_kmeans(inputs_TD, self.options["num_clusters"], generator).centroids_KD.float()
