"""Experts drawn anew: a mixture from scratch, the baseline of every upcycling method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from moe.errors import require
from moe.routers.base import Router
from moe.upcycle.base import UpcycleConfig, UpcycleMethod
from moe.upcycle.layer_plan import Drawn, Draws, ExpertPlan, FFNShape, LayerPlan


@dataclass(frozen=True)
class RandomConfig(UpcycleConfig):
    """Config of `Random`."""

    name: Literal["random"] = "random"
    init_std: float = 0.02
    """Standard deviation of the weights."""
    expert_width: int | None = None
    """F of an expert; None takes the width of the dense network."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            (self.init_std > 0, "init_std", "experts of zeros stay equal", "Set it above 0; 0.02 is usual."),
            (
                self.expert_width is None or self.expert_width >= 1,
                "expert_width",
                "must be at least 1",
                "Or leave it at null.",
            ),
        )


class Random(UpcycleMethod[RandomConfig]):
    """Independent normal weights and zero biases; only shape and activation come from the dense network."""

    name = "random"
    config_class = RandomConfig

    def is_exact(self, router: Router[Any]) -> bool:
        """Never: it is another function."""
        return False

    def plan(self, shape: FFNShape, draws: Draws, statistics: Mapping[str, Tensor]) -> LayerPlan:
        """Experts that read no dense neuron."""
        width = self.config.expert_width or shape.width
        expert = ExpertPlan(width, None, drawn=Drawn(std=self.config.init_std), down_bias=0.0)
        return LayerPlan((expert,) * self.config.num_experts)
