"""DeepSeek's routers. Groups stand in their own tests: an expert's place decides its group."""

from __future__ import annotations

from moe.routers.configs.deepseek_v3_config import DeepSeekV3Config
from tests.moe.routers.router_case import RouterCase

CASE = RouterCase(
    variants=(
        DeepSeekV3Config(bias_update="proportional", bias_rate=0.1, balance_scope="global_batch"),
        DeepSeekV3Config(score="softmax", bias_rate=0.01, z_coef=0.1, balance_scope="micro_batch"),
        DeepSeekV3Config(score="softmax", renormalise=False, bias_rate=0.0),
        DeepSeekV3Config(top_k=1, renormalise=False, balance_coef=0.0),
        DeepSeekV3Config(top_k=4, routed_scaling=2.5),
    )
)
