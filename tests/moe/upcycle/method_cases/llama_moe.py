"""LLaMA-MoE."""

from __future__ import annotations

from moe.upcycle.configs.llama_moe_config import LlamaMoEConfig
from tests.moe.upcycle.method_case import MethodCase

CASE = MethodCase(
    variants=(
        LlamaMoEConfig(num_experts=4, split="cluster", scale_factor=4.0),
        LlamaMoEConfig(num_experts=4, split="coactivation"),
        LlamaMoEConfig(num_experts=4, split="gradient"),
        LlamaMoEConfig(num_experts=4, split="sharing_inner"),
        LlamaMoEConfig(num_experts=7, split="sharing_inter", cluster_tokens=50),
        LlamaMoEConfig(num_experts=6, split="sharing_inter", num_shared=2),
    )
)
