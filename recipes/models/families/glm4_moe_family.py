"""GLM-4.5 and later (arXiv 2508.06471): DeepSeek-V3's router."""

from __future__ import annotations

from typing import Any

from moe.routers.configs.deepseek_v3_config import DeepSeekV3Config
from recipes.models.families.base import MoEFamily, grouped_sigmoid


class Glm4MoEFamily(MoEFamily):
    """`Glm4MoeMoE`."""

    name = "glm4_moe"
    title = "GLM-4-MoE"
    block_class = "Glm4MoeMoE"
    shared = "shared_experts"
    router_keys = {"weight_ED": "gate.weight", "bias_E": "gate.e_score_correction_bias"}
    fp32 = ("e_score_correction_bias",)

    def router(self, config: Any, layers: int) -> DeepSeekV3Config:
        """See `MoEFamily.router`."""
        return grouped_sigmoid(config)
