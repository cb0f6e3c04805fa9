"""Experts drawn anew: an MoE from scratch, the baseline of every upcycling method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moe.routers.base import Router
from moe.upcycle.base import UpcycleMethod
from moe.upcycle.configs.random_init_config import RandomConfig
from moe.upcycle.dense_shape import FFNShape
from moe.upcycle.layer_plan import Drawn, Draws, ExpertPlan, LayerPlan


class Random(UpcycleMethod[RandomConfig]):
    """Method with independent normal weights and zero biases; shape and activation are the dense ones."""

    name = "random"
    config_class = RandomConfig

    def is_exact(self, router: Router[Any]) -> bool:
        """Returns False: it is another function."""
        return False

    def plan(self, shape: FFNShape, draws: Draws, statistics: Mapping[str, Tensor]) -> LayerPlan:
        """Plans experts that read no dense neuron."""
        width = self.config.expert_width or shape.width
        expert = ExpertPlan(width, None, drawn=Drawn(std=self.config.init_std), down_bias=0.0)
        return LayerPlan((expert,) * self.config.num_experts)
