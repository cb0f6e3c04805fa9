"""Ernie 4.5: softmax scores, a selection bias, and a shared expert."""

from __future__ import annotations

from typing import Any

from moe.routers.configs.deepseek_v3_config import DeepSeekV3Config
from recipes.models.families.base import MoEFamily


class ErnieFamily(MoEFamily):
    """`Ernie4_5_MoeSparseMoeBlock`."""

    name = "ernie4_5_moe"
    title = "Ernie-4.5-MoE"
    block_class = "Ernie4_5_MoeSparseMoeBlock"
    shared = "shared_experts"
    router_keys = {"weight_ED": "gate.weight", "bias_E": "moe_statics.e_score_correction_bias"}
    fp32 = ("gate.weight", "e_score_correction_bias")

    def router(self, config: Any, layers: int) -> DeepSeekV3Config:
        """See `MoEFamily.router`."""
        return DeepSeekV3Config(top_k=config.num_experts_per_tok, score="softmax", renormalise=True)
