"""Importance of neurons: the change of the loss without a neuron, to first order, ``|h * dL/dh|``.

Source: LLaMA-MoE (arXiv 2406.16554, "feature change"), and v2 (arXiv 2411.15708) for clusters of tokens.

Letters: T tokens, D model width, E clusters, F width of the dense network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from moe.upcycle.dense_shape import FFNShape
from moe.upcycle.statistics.base import LayerBatch, Statistic


def _importance(batch: LayerBatch) -> Tensor:
    return (batch.hidden_TF * batch.grad_hidden_TF).abs()


class Importance(Statistic):
    """Mean over tokens of ``|h * dL/dh|``, ``[F]``; L is the sum of the tokens' losses."""

    name = "importance_F"
    needs_gradient = True

    def start(self) -> None:
        """See `Statistic.start`."""
        self.sums = self.zeros_per_token("change", self.ffn.width)

    def update(self, batch: LayerBatch) -> None:
        """Adds a batch."""
        self.sums["change"] += _importance(batch).sum(0, dtype=torch.float64)
        self.sums["tokens"] += len(batch.x_TD)

    def result(self) -> Tensor:
        """``[F]`` fp64."""
        return (self.sums["change"] / self.sums["tokens"].clamp_min(1)).cpu()


class ClusterImportance(Statistic):
    """Mean over the tokens of each cluster of ``|h * dL/dh|``, ``[E, F]``.

    A token belongs to the cluster with the highest ``centroid . x``, as a router with these rows would
    choose. The mean runs over a cluster's own tokens, so that frequent clusters are not more important. A
    cluster without tokens has zeros.
    """

    name = "importance_EF"
    after: ClassVar[tuple[str, ...]] = ("centroids_ED",)
    needs_gradient = True

    def start(self) -> None:
        """See `Statistic.start`."""
        self._centroids_ED = self.earlier["centroids_ED"].to(self.ffn.up_FD.device)
        self.sums = self.zeros_per_token("change", len(self._centroids_ED), self.ffn.width)

    @classmethod
    def num_bytes(cls, shape: FFNShape, options: Mapping[str, int]) -> int:
        """Returns the bytes of 64 rows, an ample guess of the number of clusters, which is unknown here."""
        return 64 * 8 * shape.width

    def update(self, batch: LayerBatch) -> None:
        """Adds a batch."""
        cluster_T = (batch.x_TD.float() @ self._centroids_ED.t()).argmax(1)
        self.sums["change"].index_add_(0, cluster_T, _importance(batch).double())
        self.sums["tokens"] += torch.bincount(cluster_T, minlength=len(self._centroids_ED))

    def result(self) -> Tensor:
        """Returns ``[E, F]`` fp64."""
        return (self.sums["change"] / self.sums["tokens"].clamp_min(1)[:, None]).cpu()


class OutputImportance(Statistic):
    """Mean over tokens of ``|h_i * mean_d W2[d, i]|``, ``[F]``, without gradients (arXiv 2512.02351)."""

    name = "output_importance_F"

    def start(self) -> None:
        """See `Statistic.start`."""
        self.sums = self.zeros_per_token("magnitude", self.ffn.width)

    def update(self, batch: LayerBatch) -> None:
        """Adds a batch; the weights' factor is the same for all tokens and is applied at the end."""
        self.sums["magnitude"] += batch.hidden_TF.abs().sum(0, dtype=torch.float64)
        self.sums["tokens"] += len(batch.x_TD)

    def result(self) -> Tensor:
        """``[F]`` fp64."""
        mean_F = self.ffn.down_DF.double().mean(0).abs()
        return (self.sums["magnitude"] * mean_F / self.sums["tokens"].clamp_min(1)).cpu()
