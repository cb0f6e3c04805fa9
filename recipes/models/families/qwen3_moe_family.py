"""Qwen3-MoE (arXiv 2505.09388): a softmax over all experts, renormalised if the config says so."""

from __future__ import annotations

from typing import Any

from moe.routers.configs.topk_config import TopKConfig
from recipes.models.families.base import MoEFamily, softmax_top_k


class Qwen3MoEFamily(MoEFamily):
    """`Qwen3MoeSparseMoeBlock`."""

    name = "qwen3_moe"
    title = "Qwen3-MoE"
    block_class = "Qwen3MoeSparseMoeBlock"

    def router(self, config: Any, layers: int) -> TopKConfig:
        """See `MoEFamily.router`."""
        return softmax_top_k(config, layers, renormalise=config.norm_topk_prob)
