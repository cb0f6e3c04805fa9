"""OLMoE (arXiv 2409.02060): a softmax over all experts, as it is unless the config says otherwise."""

from __future__ import annotations

from typing import Any

from moe.routers.configs.topk_config import TopKConfig
from recipes.models.families.base import MoEFamily, softmax_top_k


class OLMoEFamily(MoEFamily):
    """`OlmoeSparseMoeBlock`."""

    name = "olmoe"
    title = "OLMoE"
    block_class = "OlmoeSparseMoeBlock"

    def router(self, config: Any, layers: int) -> TopKConfig:
        """See `MoEFamily.router`."""
        return softmax_top_k(config, layers, renormalise=config.norm_topk_prob)
