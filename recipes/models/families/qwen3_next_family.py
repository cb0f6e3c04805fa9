"""Qwen3-Next: Qwen2-MoE's layer in blocks with linear attention."""

from __future__ import annotations

from recipes.models.families.qwen2_moe_family import Qwen2MoEFamily


class Qwen3NextFamily(Qwen2MoEFamily):
    """`Qwen3NextSparseMoeBlock`."""

    name = "qwen3_next"
    title = "Qwen3-Next"
    block_class = "Qwen3NextSparseMoeBlock"
