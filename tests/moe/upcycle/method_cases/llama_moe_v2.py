"""LLaMA-MoE v2."""

from __future__ import annotations

from moe.upcycle.configs.llama_moe_v2_config import LlamaMoEV2Config
from tests.moe.upcycle.method_case import MethodCase

CASE = MethodCase(
    variants=(
        LlamaMoEV2Config(num_experts=4, residual=False, layers="all"),
        LlamaMoEV2Config(num_experts=3, router_rows="raw_centroids", scale_factor=1.0),
        LlamaMoEV2Config(num_experts=3, router_rows="drawn", cluster_tokens=50),
    ),
    job={"upcycle.num_experts": 3, "upcycle.layers": "all"},
)
