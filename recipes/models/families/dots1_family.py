"""dots.llm1 (arXiv 2506.05767): DeepSeek-V3's router."""

from __future__ import annotations

from recipes.models.families.deepseek_v3_family import DeepSeekV3Family


class Dots1Family(DeepSeekV3Family):
    """`Dots1MoE`."""

    name = "dots1"
    title = "dots.llm1"
    block_class = "Dots1MoE"
