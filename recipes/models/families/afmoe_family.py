"""AfMoE, Arcee's Trinity (arXiv 2602.17004): sigmoids, a selection bias, scaled weights, no groups."""

from __future__ import annotations

from typing import Any

from moe.routers.configs.deepseek_v3_config import DeepSeekV3Config
from recipes.models.families.base import MoEFamily


class AfMoEFamily(MoEFamily):
    """`AfmoeSparseMoeBlock`."""

    name = "afmoe"
    title = "AfMoE"
    block_class = "AfmoeSparseMoeBlock"
    shared = "shared_experts"
    router_keys = {"weight_ED": "router.gate.weight", "bias_E": "expert_bias"}
    fp32 = ("expert_bias",)

    def router(self, config: Any, layers: int) -> DeepSeekV3Config:
        """See `MoEFamily.router`; transformers ignores ``score_func`` and ``route_norm``."""
        return DeepSeekV3Config(top_k=config.num_experts_per_tok, routed_scaling=float(config.route_scale))
