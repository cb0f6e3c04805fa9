"""LLaMA-MoE: experts divide the dense neurons at random, or by weights, coactivation or importance.

Source: Zhu et al. 2024 (arXiv 2406.16554) and its release. The release measures importance on 16 clusters of
texts, one for each expert; here the layer's inputs are clustered, as in v2. A spectral partition refined by
exchanges (`moe.upcycle.neuron_split.coactivation_groups`) takes the place of METIS.

Letters: E experts, F width of the dense network or of an expert, K experts a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe.routers.base import Router
from moe.upcycle.base import UpcycleMethod
from moe.upcycle.configs.llama_moe_config import LlamaMoEConfig
from moe.upcycle.dense_shape import FFNShape
from moe.upcycle.gates import Gates, observe
from moe.upcycle.layer_plan import Draws, LayerPlan
from moe.upcycle.neuron_split import (
    coactivation_groups,
    greedy_groups,
    groups_of,
    most_wanted,
    random_groups,
    top_groups,
)
from moe.upcycle.partition import is_whole, parts_plan

_STATISTIC = {
    "cluster": "row_clusters_F",
    "coactivation": "coactivation_FF",
    "gradient": "importance_EF",
    "sharing_inner": "importance_EF",
    "sharing_inter": "importance_EF",
}
# Percentage of neurons that count as active, for activations that are never 0.
_ACTIVE_PERCENT = 10


class LlamaMoE(UpcycleMethod[LlamaMoEConfig]):
    """Method that divides the dense neurons, with the exceptions listed at `LlamaMoEConfig.split`."""

    name = "llama_moe"
    config_class = LlamaMoEConfig

    @property
    def statistics(self) -> tuple[str, ...]:
        """The statistic that the split needs."""
        found = _STATISTIC.get(self.config.split)
        return () if found is None else (found,)

    @property
    def statistic_options(self) -> Mapping[str, Mapping[str, int]]:
        """Asks for as many clusters as experts."""
        E = self.config.num_experts
        if self.config.split == "cluster":
            return {"row_clusters_F": {"num_clusters": E}}
        if self.config.split == "coactivation":
            return {"coactivation_FF": {"top_percent": _ACTIVE_PERCENT}}
        if self.statistics:
            tokens = self.config.cluster_tokens
            return {"centroids_ED": {"num_clusters": E}, "inputs_TD": {"num_tokens": tokens}}
        return {}

    def is_exact(self, router: Router[Any]) -> bool:
        """Returns True only if every token uses each neuron once, at weight 1."""
        gates = observe(router.config, router.num_experts)
        divides = self.config.split != "sharing_inner"
        return divides and is_whole(gates, router.num_experts, self._factor(gates))

    def plan(self, shape: FFNShape, draws: Draws, statistics: Mapping[str, Tensor]) -> LayerPlan:
        """Divides the neurons by the split."""
        groups_EM, shared_F = self._divide(shape, draws, statistics)
        return parts_plan(list(groups_EM), self._factor(self.gates), self.gates, shared_F)

    def _divide(
        self, shape: FFNShape, draws: Draws, statistics: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        E, split = self.config.num_experts, self.config.split
        generator = draws.generator("split")
        if split == "random":
            return random_groups(shape.width, E, generator), None
        found = statistics[_STATISTIC[split]]
        if split == "cluster":
            return groups_of(found, E), None
        if split == "coactivation":
            return coactivation_groups(found, E, generator), None
        if split == "sharing_inner":
            return top_groups(found, shape.width // E), None
        if split == "gradient":
            return greedy_groups(found), None
        return share_and_divide(found, self.config.num_shared)

    def _factor(self, gates: Gates) -> float:
        return self.config.scale_factor or self.config.num_experts / gates.top_k


def share_and_divide(score_EF: Tensor, num_shared: int) -> tuple[Tensor, Tensor]:
    """Shares the neurons that most experts find important, and divides the rest by importance.

    Args:
        score_EF: ``[E, F]`` importance of each neuron to each expert.
        num_shared: Width of the shared expert in widths of a routed one, at least 1.

    Returns:
        ``[E, M]`` neurons of the routed experts, and the neurons of the shared one.
    """
    E, F = score_EF.shape
    width = F // (E + num_shared)
    shared_F = most_wanted(score_EF, width, num_shared * width)
    left_F = torch.ones(F, dtype=torch.bool).index_fill(0, shared_F, False).nonzero().squeeze(1)
    return left_F[greedy_groups(score_EF[:, left_F])], shared_F
