"""Granite-MoE: a softmax over the chosen logits alone, and experts that are stacked on disk."""

from __future__ import annotations

from typing import Any

from moe.routers.configs.topk_config import TopKConfig
from recipes.models.families.base import MoEFamily, softmax_top_k


class GraniteMoEFamily(MoEFamily):
    """`GraniteMoeMoE`."""

    name = "granitemoe"
    title = "Granite-MoE"
    block_class = "GraniteMoeMoE"
    stored_site = "block_sparse_moe"
    fused = ("input_linear.weight", "output_linear.weight")
    router_keys = {"weight_ED": "router.layer.weight"}

    def router(self, config: Any, layers: int) -> TopKConfig:
        """See `MoEFamily.router`."""
        return softmax_top_k(config, layers, renormalise=True, order="topk_then_score")
