"""Clusters of neurons by their weights.

Letters: D model width, F width of the dense network.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import normalize

from moe.upcycle.clustering import balanced_kmeans
from moe.upcycle.statistics.base import Statistic


class RowClusters(Statistic):
    """Cluster of each neuron, ``[F]`` int64, by balanced k-means of the normalised up rows.

    It reads no text. MoEfication (arXiv 2110.01786) and LLaMA-MoE (arXiv 2406.16554) form experts this way.
    """

    name = "row_clusters_F"
    reads_text = False
    defaults: ClassVar[Mapping[str, int]] = MappingProxyType({"num_clusters": 8})

    def result(self) -> Tensor:
        """Clusters the rows."""
        rows_FD = normalize(self.ffn.up_FD.float(), dim=1).cpu()
        generator = self.draws.generator("row_clusters")
        return balanced_kmeans(rows_FD, self.options["num_clusters"], generator).labels_N
