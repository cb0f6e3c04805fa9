"""Phi-3.5-MoE (arXiv 2404.14219): SparseMixer-2, whose weights do not sum to 1."""

from __future__ import annotations

from typing import Any

from moe.routers.configs.sparsemixer_config import SparseMixerConfig
from recipes.models.families.base import MoEFamily


class PhiMoEFamily(MoEFamily):
    """`PhimoeSparseMoeBlock`."""

    name = "phimoe"
    title = "Phi-MoE"
    block_class = "PhimoeSparseMoeBlock"
    stored_site = "block_sparse_moe"
    matrices = {"gate": "w1", "up": "w3", "down": "w2"}

    def router(self, config: Any, layers: int) -> SparseMixerConfig:
        """See `MoEFamily.router`; it samples in training, and is the same in evaluation."""
        coef = float(config.router_aux_loss_coef) * config.num_experts_per_tok / layers
        return SparseMixerConfig(
            top_k=config.num_experts_per_tok, jitter=config.router_jitter_noise, balance_coef=coef
        )

    def left_out(self, config: Any) -> list[str]:
        """See `MoEFamily.left_out`; the other jitter is the sampling's own."""
        noise = config.input_jitter_noise
        return [f"its layers' inputs get no jitter (input_jitter_noise={noise})"] if noise else []
