"""Jamba (arXiv 2403.19887): Mamba and attention, with experts in every other block, weights unnormalised."""

from __future__ import annotations

from typing import Any

from moe.routers.configs.topk_config import TopKConfig
from recipes.models.families.base import MoEFamily, softmax_top_k


class JambaFamily(MoEFamily):
    """`JambaSparseMoeBlock`."""

    name = "jamba"
    title = "Jamba"
    block_class = "JambaSparseMoeBlock"
    stored_site = "feed_forward"
    router_keys = {"weight_ED": "router.weight"}

    def router(self, config: Any, layers: int) -> TopKConfig:
        """See `MoEFamily.router`."""
        return softmax_top_k(config, layers, renormalise=False)
