"""Qwen2-MoE (arXiv 2407.10671): a softmax over all experts, and a shared expert that is scaled by a gate."""

from __future__ import annotations

from recipes.models.families.qwen3_moe_family import Qwen3MoEFamily


class Qwen2MoEFamily(Qwen3MoEFamily):
    """`Qwen2MoeSparseMoeBlock`."""

    name = "qwen2_moe"
    title = "Qwen2-MoE"
    block_class = "Qwen2MoeSparseMoeBlock"
    shared = "shared_expert"
    shared_gate = "shared_expert_gate.weight"
