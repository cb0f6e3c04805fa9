"""How much the loss would change without a neuron, to first order: ``|h * dL/dh|``.

Source: LLaMA-MoE (arXiv 2406.16554, "feature change"), and v2 (arXiv 2411.15708) for clusters of tokens.

Letters: T tokens, D model width, E clusters, F width of the dense network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from moe.experts.weights import FFNWeights
from moe.upcycle.layer_plan import Draws, FFNShape
from moe.upcycle.statistics.base import LayerBatch, Statistic


def _importance(batch: LayerBatch) -> Tensor:
    return (batch.hidden_TF * batch.grad_hidden_TF).abs()


class Importance(Statistic):
    """``[F]`` mean over tokens of ``|h * dL/dh|``; L is the sum of the tokens' losses."""

    name = "importance_F"
    needs_gradient = True

    def __init__(
        self, ffn: FFNWeights, options: Mapping[str, int], earlier: Mapping[str, Tensor], draws: Draws
    ) -> None:
        super().__init__(ffn, options, earlier, draws)
        device = ffn.up_FD.device
        self.sums = {
            "change": torch.zeros(ffn.width, dtype=torch.float64, device=device),
            "tokens": torch.zeros((), dtype=torch.int64, device=device),
        }

    def update(self, batch: LayerBatch) -> None:
        """Adds a batch."""
        self.sums["change"] += _importance(batch).sum(0, dtype=torch.float64)
        self.sums["tokens"] += len(batch.x_TD)

    def result(self) -> Tensor:
        """``[F]`` fp64."""
        return (self.sums["change"] / self.sums["tokens"].clamp_min(1)).cpu()


class ClusterImportance(Statistic):
    """``[E, F]`` the same for the tokens of each cluster.

    A token is of the cluster of highest ``centroid . x``, which is how a router of these rows chooses.
    The mean is over a cluster's own tokens, so that a frequent cluster is no more important. A cluster
    without tokens has zeros.
    """

    name = "importance_EF"
    after: ClassVar[tuple[str, ...]] = ("centroids_ED",)
    needs_gradient = True

    def __init__(
        self, ffn: FFNWeights, options: Mapping[str, int], earlier: Mapping[str, Tensor], draws: Draws
    ) -> None:
        super().__init__(ffn, options, earlier, draws)
        self._centroids_ED = earlier["centroids_ED"].to(ffn.up_FD.device)
        E = len(self._centroids_ED)
        self.sums = {
            "change": torch.zeros(E, ffn.width, dtype=torch.float64, device=ffn.up_FD.device),
            "tokens": torch.zeros(E, dtype=torch.int64, device=ffn.up_FD.device),
        }

    @classmethod
    def num_bytes(cls, shape: FFNShape, options: Mapping[str, int]) -> int:
        """One row a cluster; how many there are is not known here, and 64 is many."""
        return 64 * 8 * shape.width

    def update(self, batch: LayerBatch) -> None:
        """Adds a batch."""
        cluster_T = (batch.x_TD.float() @ self._centroids_ED.t()).argmax(1)
        self.sums["change"].index_add_(0, cluster_T, _importance(batch).double())
        self.sums["tokens"] += torch.bincount(cluster_T, minlength=len(self._centroids_ED))

    def result(self) -> Tensor:
        """``[E, F]`` fp64."""
        return (self.sums["change"] / self.sums["tokens"].clamp_min(1)[:, None]).cpu()


class OutputImportance(Statistic):
    """``[F]`` mean over tokens of ``|h_i * mean_d W2[d, i]|``, without gradients (arXiv 2512.02351)."""

    name = "output_importance_F"

    def __init__(
        self, ffn: FFNWeights, options: Mapping[str, int], earlier: Mapping[str, Tensor], draws: Draws
    ) -> None:
        super().__init__(ffn, options, earlier, draws)
        device = ffn.up_FD.device
        self.sums = {
            "magnitude": torch.zeros(ffn.width, dtype=torch.float64, device=device),
            "tokens": torch.zeros((), dtype=torch.int64, device=device),
        }

    def update(self, batch: LayerBatch) -> None:
        """Adds a batch; the factor of the weights is the same for all tokens and comes in at the end."""
        self.sums["magnitude"] += batch.hidden_TF.abs().sum(0, dtype=torch.float64)
        self.sums["tokens"] += len(batch.x_TD)

    def result(self) -> Tensor:
        """``[F]`` fp64."""
        mean_F = self.ffn.down_DF.double().mean(0).abs()
        return (self.sums["magnitude"] * mean_F / self.sums["tokens"].clamp_min(1)).cpu()
