"""CMoE."""

from __future__ import annotations

from moe.upcycle.configs.cmoe_config import CMoEConfig
from tests.moe.upcycle.method_case import MethodCase

CASE = MethodCase(
    variants=(
        CMoEConfig(num_experts=4, num_shared=0),
        CMoEConfig(num_experts=6, num_shared=2, activation_top_k=3, marker_tokens=50),
    ),
    sums=True,
    job={"router": "analytical"},
)
