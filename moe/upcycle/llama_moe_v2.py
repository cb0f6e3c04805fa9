"""LLaMA-MoE v2: a shared expert of neurons important to all tokens, routed experts for clusters of tokens.

Source: Qu et al. 2024 (arXiv 2411.15708), MLP-MoE, and its release. The layer's inputs are clustered, and the
centroids become the router's rows, so that tokens go to the experts that hold their neurons. Its attention
experts are in `moe.attention.routed_attention`. Of its alignment of output moments, the deviation is
implemented; the mean is not, as it needs a bias that Mixtral lacks.

Letters: D model width, E experts, F width of the dense network or of an expert, K experts a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe.errors import Mistake
from moe.routers.base import Router
from moe.routers.configs import RouterConfig
from moe.upcycle.base import UpcycleMethod
from moe.upcycle.configs.llama_moe_v2_config import LlamaMoEV2Config
from moe.upcycle.dense_shape import FFNShape
from moe.upcycle.gates import Gates, observe
from moe.upcycle.layer_plan import Draws, LayerPlan, RouterStart
from moe.upcycle.llama_moe import share_and_divide
from moe.upcycle.partition import is_whole, parts_plan


class LlamaMoEV2(UpcycleMethod[LlamaMoEV2Config]):
    """Method that makes one shared expert and divides the other neurons."""

    name = "llama_moe_v2"
    config_class = LlamaMoEV2Config

    @property
    def statistics(self) -> tuple[str, ...]:
        """Importance by cluster and the clusters' centroids."""
        return ("importance_EF", "centroids_ED") if self.config.residual else ()

    @property
    def aligns_outputs(self) -> bool:
        """See `LlamaMoEV2Config.align_outputs`."""
        return self.config.align_outputs

    @property
    def statistic_options(self) -> Mapping[str, Mapping[str, int]]:
        """Asks for as many clusters as experts."""
        if not self.config.residual:
            return {}
        return {
            "centroids_ED": {"num_clusters": self.config.num_experts},
            "inputs_TD": {"num_tokens": self.config.cluster_tokens},
        }

    def is_exact(self, router: Router[Any]) -> bool:
        """Returns True only if every token uses every expert, at weight 1."""
        gates = observe(router.config, router.num_experts)
        return is_whole(gates, router.num_experts, self._factor(gates))

    def check_router(self, router: RouterConfig) -> list[Mistake]:
        """Requires a router whose rows can be centroids."""
        config = self.config
        if not config.sets_rows or observe(router, config.num_experts).has_rows:
            return []
        rule = f"the router {router.name!r} has no row for each expert that could begin at a centroid"
        remedy = "Set upcycle.router_rows=drawn, or choose a router such as topk."
        return [Mistake("upcycle.router_rows", config.router_rows, rule, remedy)]

    def plan(self, shape: FFNShape, draws: Draws, statistics: Mapping[str, Tensor]) -> LayerPlan:
        """Divides the neurons by importance, or into runs."""
        factor = self._factor(self.gates)
        if not self.config.residual:
            return parts_plan(torch.arange(shape.width).chunk(self.config.num_experts), factor, self.gates)
        groups_EM, shared_F = share_and_divide(statistics["importance_EF"], 1)
        plan = parts_plan(list(groups_EM), factor, self.gates, shared_F)
        if not self.config.sets_rows:
            return plan
        rows_ED = statistics["centroids_ED"]
        if self.config.router_rows == "centroids":
            # One factor for all rows, which keeps the order of the logits.
            rows_ED = rows_ED / rows_ED.square().sum(1).mean().clamp_min(1e-30)
        return replace(plan, router=RouterStart(rows_ED=rows_ED))

    def _factor(self, gates: Gates) -> float:
        own = gates.top_k if self.config.residual else self.config.num_experts / gates.top_k
        return self.config.scale_factor or float(own)
