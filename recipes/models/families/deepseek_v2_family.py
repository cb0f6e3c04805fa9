"""DeepSeek-V2 (arXiv 2405.04434): softmax weights as they are, groups by their best expert."""

from __future__ import annotations

from typing import Any

from moe.routers.configs.deepseek_v3_config import DeepSeekV3Config
from recipes.models.families.base import MoEFamily


class DeepSeekV2Family(MoEFamily):
    """`DeepseekV2Moe`."""

    name = "deepseek_v2"
    title = "DeepSeek-V2"
    block_class = "DeepseekV2Moe"
    shared = "shared_experts"

    def router(self, config: Any, layers: int) -> DeepSeekV3Config:
        """See `MoEFamily.router`; transformers ignores ``norm_topk_prob`` and computes no balance loss."""
        grouped = config.topk_method == "group_limited_greedy"
        return DeepSeekV3Config(
            top_k=config.num_experts_per_tok,
            score="softmax",
            renormalise=False,
            routed_scaling=float(config.routed_scaling_factor),
            num_groups=config.n_group if grouped else 1,
            top_groups=config.topk_group if grouped else 1,
            group_score="max",
            bias_rate=0.0,
            balance_counts="chosen",
            balance_coef=float(getattr(config, "aux_loss_alpha", None) or 0.0),
        )
