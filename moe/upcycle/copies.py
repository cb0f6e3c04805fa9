"""Sparse upcycling: every expert is a copy of the dense feed-forward network (arXiv 2212.05055).

It is exact at step 0 for any router whose combine weights sum to 1, since ``sum_k w_k f(x) = f(x)``.

Letters: F width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe.routers.base import Router
from moe.upcycle.base import UpcycleMethod
from moe.upcycle.configs.copies_config import CopyConfig
from moe.upcycle.dense_shape import FFNShape
from moe.upcycle.layer_plan import Draws, ExpertPlan, LayerPlan, Noise


class Copy(UpcycleMethod[CopyConfig]):
    """Method that takes E copies of the dense network, optionally with noise or permuted neurons."""

    name = "copy"
    config_class = CopyConfig

    def is_exact(self, router: Router[Any]) -> bool:
        """Returns True without noise, if weights sum to 1."""
        return self.config.noise_std == 0 and router.weights_sum_to_one

    def plan(self, shape: FFNShape, draws: Draws, statistics: Mapping[str, Tensor]) -> LayerPlan:
        """Puts every neuron into every expert."""
        noise = Noise(self.config.noise_std) if self.config.noise_std else None
        return LayerPlan(
            tuple(
                ExpertPlan(shape.width, self._neurons(shape.width, draws, e), noise=noise)
                for e in range(self.config.num_experts)
            )
        )

    def _neurons(self, width: int, draws: Draws, expert: int) -> slice | Tensor:
        if not self.config.permute:
            return slice(0, width)
        return torch.randperm(width, generator=draws.generator("order", expert))
