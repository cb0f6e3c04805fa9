"""MiniMax-M2: sigmoids, a selection bias, weights that sum to 1, no groups."""

from __future__ import annotations

from typing import Any

from moe.routers.configs.deepseek_v3_config import DeepSeekV3Config
from recipes.models.families.base import MoEFamily


class MiniMaxM2Family(MoEFamily):
    """`MiniMaxM2SparseMoeBlock`."""

    name = "minimax_m2"
    title = "MiniMax-M2"
    block_class = "MiniMaxM2SparseMoeBlock"
    stored_site = "block_sparse_moe"
    matrices = {"gate": "w1", "up": "w3", "down": "w2"}
    router_keys = {"weight_ED": "gate.weight", "bias_E": "e_score_correction_bias"}
    fp32 = ("e_score_correction_bias", "block_sparse_moe.gate.weight")

    def router(self, config: Any, layers: int) -> DeepSeekV3Config:
        """See `MoEFamily.router`."""
        return DeepSeekV3Config(top_k=config.num_experts_per_tok)
