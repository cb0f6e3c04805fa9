"""GLM-4.5 and later (arXiv 2508.06471): DeepSeek-V3's router."""

from __future__ import annotations

from recipes.models.families.deepseek_v3_family import DeepSeekV3Family


class Glm4MoEFamily(DeepSeekV3Family):
    """`Glm4MoeMoE`."""

    name = "glm4_moe"
    title = "GLM-4-MoE"
    block_class = "Glm4MoeMoE"
