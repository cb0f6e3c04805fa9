"""DeepSeek-V3 and R1, Moonlight (arXiv 2412.19437): sigmoids, groups, and a selection bias."""

from __future__ import annotations

from typing import Any

from moe.routers.configs.deepseek_v3_config import DeepSeekV3Config
from recipes.models.families.base import MoEFamily, grouped_sigmoid


class DeepSeekV3Family(MoEFamily):
    """`DeepseekV3MoE`."""

    name = "deepseek_v3"
    title = "DeepSeek-V3"
    block_class = "DeepseekV3MoE"
    shared = "shared_experts"
    router_keys = {"weight_ED": "gate.weight", "bias_E": "gate.e_score_correction_bias"}
    fp32 = ("e_score_correction_bias",)

    def router(self, config: Any, layers: int) -> DeepSeekV3Config:
        """See `MoEFamily.router`."""
        return grouped_sigmoid(config)
