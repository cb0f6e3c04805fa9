"""Mixtral (arXiv 2401.04088): a softmax over all experts, renormalised over the chosen ones."""

from __future__ import annotations

from typing import Any

from moe.routers.configs.topk_config import TopKConfig
from recipes.models.families.base import MoEFamily, softmax_top_k


class MixtralFamily(MoEFamily):
    """`MixtralSparseMoeBlock`."""

    name = "mixtral"
    title = "Mixtral"
    block_class = "MixtralSparseMoeBlock"
    stored_site = "block_sparse_moe"
    matrices = {"gate": "w1", "up": "w3", "down": "w2"}

    def router(self, config: Any, layers: int) -> TopKConfig:
        """See `MoEFamily.router`."""
        return softmax_top_k(config, layers, renormalise=True)
