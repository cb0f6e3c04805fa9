"""Hunyuan-A13B: a softmax over all experts, renormalised, and a shared expert."""

from __future__ import annotations

from typing import Any

from moe.routers.configs.topk_config import TopKConfig
from recipes.models.families.base import MoEFamily


class HunyuanFamily(MoEFamily):
    """`HunYuanMoEV1Moe`."""

    name = "hunyuan_v1_moe"
    title = "Hunyuan-MoE"
    block_class = "HunYuanMoEV1Moe"
    router_keys = {"weight_ED": "gate.wg.weight"}
    shared = "shared_mlp"

    def router(self, config: Any, layers: int) -> TopKConfig:
        """See `MoEFamily.router`; transformers computes no balance loss."""
        top_k = config.moe_topk if isinstance(config.moe_topk, int) else config.moe_topk[0]
        return TopKConfig(top_k=top_k, renormalise=True)
