"""Inputs of the dense network, and their clusters.

Letters: T tokens, D model width, E clusters.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from moe.upcycle.clustering import balanced_kmeans
from moe.upcycle.dense_shape import FFNShape
from moe.upcycle.statistics.base import LayerBatch, Statistic
from moe.upcycle.statistics.reservoir import ReservoirStatistic


class Inputs(ReservoirStatistic):
    """Inputs of a bounded sample of tokens, ``[T, D]`` fp32."""

    name = "inputs_TD"
    defaults: ClassVar[Mapping[str, int]] = MappingProxyType({"num_tokens": 8192})

    def start(self) -> None:
        """See `Statistic.start`."""
        self.empty(self.ffn.model_width, torch.float32)

    @classmethod
    def num_bytes(cls, shape: FFNShape, options: Mapping[str, int]) -> int:
        """Returns the bytes of fp32 rows and token numbers."""
        return options["num_tokens"] * (4 * shape.model_width + 8)

    def update(self, batch: LayerBatch) -> None:
        """Offers a batch to the sample."""
        self.keep(batch.x_TD, batch.index_T)


class Centroids(Statistic):
    """Centroids of a balanced k-means of sampled inputs, ``[E, D]`` fp32 (LLaMA-MoE v2's router rows)."""

    name = "centroids_ED"
    after: ClassVar[tuple[str, ...]] = ("inputs_TD",)
    reads_text = False
    defaults: ClassVar[Mapping[str, int]] = MappingProxyType({"num_clusters": 8})

    def result(self) -> Tensor:
        """Clusters the sample."""
        inputs_TD = self.earlier["inputs_TD"]
        generator = self.draws.generator("centroids")
        return balanced_kmeans(inputs_TD, self.options["num_clusters"], generator).centroids_KD.float()
