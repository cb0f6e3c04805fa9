"""dots.llm1 (arXiv 2506.05767): DeepSeek-V3's router."""

from __future__ import annotations

from typing import Any

from moe.routers.configs.deepseek_v3_config import DeepSeekV3Config
from recipes.models.families.base import MoEFamily, grouped_sigmoid


class Dots1Family(MoEFamily):
    """`Dots1MoE`."""

    name = "dots1"
    title = "dots.llm1"
    block_class = "Dots1MoE"
    shared = "shared_experts"
    router_keys = {"weight_ED": "gate.weight", "bias_E": "gate.e_score_correction_bias"}
    fp32 = ("e_score_correction_bias",)

    def router(self, config: Any, layers: int) -> DeepSeekV3Config:
        """See `MoEFamily.router`."""
        return grouped_sigmoid(config)
