"""FlexOlmo (arXiv 2507.07024): OLMoE's router in blocks of OLMo 2."""

from __future__ import annotations

from typing import Any

from moe.routers.configs.topk_config import TopKConfig
from recipes.models.families.base import MoEFamily, softmax_top_k


class FlexOlmoFamily(MoEFamily):
    """`FlexOlmoSparseMoeBlock`."""

    name = "flex_olmo"
    title = "FlexOlmo"
    block_class = "FlexOlmoSparseMoeBlock"

    def router(self, config: Any, layers: int) -> TopKConfig:
        """See `MoEFamily.router`."""
        return softmax_top_k(config, layers, renormalise=config.norm_topk_prob)
