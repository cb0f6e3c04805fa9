"""LLaMA-MoE: experts divide the dense neurons at random, or by weights, coactivation or importance.

Source: Zhu et al. 2024 (arXiv 2406.16554) and its release. The release measures importance on 16 clusters of
texts, one for each expert; here the layer's inputs are clustered, as in v2. A spectral partition refined by
exchanges (`moe.upcycle.neuron_split.coactivation_groups`) takes the place of METIS.

Letters: E experts, F width of the dense network or of an expert, K experts a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moe.errors import Mistake, require
from moe.routers.base import Router, RouterConfig
from moe.types import unless
from moe.upcycle.base import UpcycleConfig, UpcycleMethod
from moe.upcycle.gates import Gates, observe
from moe.upcycle.layer_plan import Draws, FFNShape, LayerPlan
from moe.upcycle.neuron_split import (
    coactivation_groups,
    greedy_groups,
    groups_of,
    most_wanted,
    random_groups,
    top_groups,
)
from moe.upcycle.partition import is_whole, parts_plan

Split = Literal["random", "cluster", "coactivation", "gradient", "sharing_inner", "sharing_inter"]
_STATISTIC = {
    "cluster": "row_clusters_F",
    "coactivation": "coactivation_FF",
    "gradient": "importance_EF",
    "sharing_inner": "importance_EF",
    "sharing_inter": "importance_EF",
}
# Percentage of neurons that count as active, for activations that are never 0.
_ACTIVE_PERCENT = 10


@dataclass(frozen=True)
class LlamaMoEConfig(UpcycleConfig):
    """Config of `LlamaMoE`."""

    name: Literal["llama_moe"] = "llama_moe"
    split: Split = "random"
    """``random``; ``cluster``: balanced k-means of the normalised up rows; ``coactivation``: balanced
    partition of the graph of neurons that are active together; ``gradient``: by importance for clusters of
    tokens, each neuron once; ``sharing_inner``: every expert takes its most important neurons, some twice and
    some never; ``sharing_inter``: neurons that most experts would take are shared (taken in rounds, see
    `moe.upcycle.neuron_split.most_wanted`), the rest as ``gradient``."""
    num_shared: int = 1
    """Width of the shared expert in widths of a routed one, with ``sharing_inter``."""
    cluster_tokens: int = 8192
    """Tokens that are clustered, where importance decides."""
    scale_factor: float | None = None
    """Factor on the routed experts' output, folded into their down projections; None takes ``E / K`` like the
    release. If weights sum to 1, each of K experts then weighs about E / K^2; a factor of K makes it 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            (
                self.scale_factor is None or self.scale_factor > 0,
                "scale_factor",
                "experts that count nothing cannot learn",
                "Set it above 0.",
            ),
            (
                self.num_shared >= 1,
                "num_shared",
                "sharing_inter shares at least one",
                "Set 1 or more, or another split.",
            ),
            (
                self.cluster_tokens >= self.num_experts,
                "cluster_tokens",
                "every cluster needs a token",
                "Set it to num_experts or more; thousands are usual.",
            ),
        )

    @property
    def num_parts(self) -> int:
        """Equal parts that the dense neurons are cut into."""
        return self.num_experts + (self.num_shared if self.split == "sharing_inter" else 0)

    def idle(self) -> dict[str, str]:
        """Returns the options without effect; see `Config.idle`."""
        measured = self.split in ("gradient", "sharing_inner", "sharing_inter")
        shares = self.split == "sharing_inter"
        return unless(shares, "only split=sharing_inter shares", "num_shared") | unless(
            measured, f"split={self.split} asks for no importance", "cluster_tokens"
        )


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

    def check(self, router: RouterConfig, shape: FFNShape | None) -> list[Mistake]:
        """Requires parts of one width."""
        if shape is None or shape.width % self.config.num_parts == 0:
            return []
        rule = (
            f"the {shape.width} neurons of the dense network do not divide into {self.config.num_parts} parts"
        )
        return [Mistake("upcycle.num_experts", self.config.num_experts, rule, "Set another number.")]

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
