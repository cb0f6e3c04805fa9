"""MiniMax-Text-01 (arXiv 2501.08313): Mixtral's MoE layer in blocks with lightning attention."""

from __future__ import annotations

from typing import Any

from moe.routers.configs.topk_config import TopKConfig
from recipes.models.families.base import MoEFamily, softmax_top_k


class MiniMaxFamily(MoEFamily):
    """`MiniMaxSparseMoeBlock`."""

    name = "minimax"
    title = "MiniMax-01"
    block_class = "MiniMaxSparseMoeBlock"
    stored_site = "block_sparse_moe"
    matrices = {"gate": "w1", "up": "w3", "down": "w2"}

    def router(self, config: Any, layers: int) -> TopKConfig:
        """See `MoEFamily.router`."""
        return softmax_top_k(config, layers, renormalise=True)
