"""Sparse upcycling: every expert is a copy of the dense feed-forward network (arXiv 2212.05055).

Exact at step 0 for any router whose combine weights sum to 1, since ``sum_k w_k f(x) = f(x)``.

Letters: F width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moe.errors import require
from moe.routers.base import Router
from moe.upcycle.base import UpcycleConfig, UpcycleMethod
from moe.upcycle.layer_plan import Draws, ExpertPlan, FFNShape, LayerPlan, Noise


@dataclass(frozen=True)
class CopyConfig(UpcycleConfig):
    """Config of `Copy`."""

    name: Literal["copy"] = "copy"
    noise_std: float = 0.0
    """Standard deviation of Gaussian noise on each copy, as a share of the standard deviation of the
    weight matrix. 0 keeps the copies identical and the function exact."""
    permute: bool = False
    """Whether each copy has its neurons in an order of its own. The function stays; methods that
    compare or merge experts neuron by neuron then see different experts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self, (self.noise_std >= 0, "noise_std", "a deviation is not negative", "Set it to 0 or more.")
        )


class Copy(UpcycleMethod[CopyConfig]):
    """E copies of the dense network, optionally with noise or permuted neurons."""

    name = "copy"
    config_class = CopyConfig

    def is_exact(self, router: Router[Any]) -> bool:
        """Exact without noise, under weights that sum to 1."""
        return self.config.noise_std == 0 and router.weights_sum_to_one

    def plan(self, shape: FFNShape, draws: Draws, statistics: Mapping[str, Tensor]) -> LayerPlan:
        """Every neuron in every expert."""
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
