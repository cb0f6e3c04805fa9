"""The dense network stays as an expert that every token uses; routed experts beside it begin at zero.

Exact at step 0 for any router and whatever its weights sum to: the routed experts' down projections are 0.
In the first step only these get a gradient; router and up projections follow when they have moved.

Letters: E experts, F width of the dense network or of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moe.errors import Mistake, require
from moe.routers.base import Router, RouterConfig
from moe.upcycle.base import UpcycleConfig, UpcycleMethod
from moe.upcycle.layer_plan import Drawn, Draws, ExpertPlan, FFNShape, LayerPlan, Matrix
from moe.upcycle.shuffle_slice import width_faults


@dataclass(frozen=True)
class SharedDenseConfig(UpcycleConfig):
    """Config of `SharedDense`."""

    name: Literal["shared_dense"] = "shared_dense"
    routed: Literal["copies", "drawn"] = "copies"
    """Gate and up projections of the routed experts: dense neurons (all of them, or a random choice for each
    expert where it is narrower), or drawn with `init_std`."""
    expert_width: int | None = None
    """F of a routed expert, at most the dense network's; None takes that."""
    init_std: float = 0.02
    """Standard deviation of weights that are drawn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            (
                self.expert_width is None or self.expert_width >= 1,
                "expert_width",
                "must be at least 1",
                "Or leave it at null.",
            ),
            (self.init_std > 0, "init_std", "experts of zeros stay equal", "Set it above 0; 0.02 is usual."),
        )


class SharedDense(UpcycleMethod[SharedDenseConfig]):
    """The dense network as shared expert, routed experts whose output is 0."""

    name = "shared_dense"
    config_class = SharedDenseConfig

    def is_exact(self, router: Router[Any]) -> bool:
        """Always: nothing is added to the dense network's output."""
        return True

    def check(self, router: RouterConfig, shape: FFNShape | None) -> list[Mistake]:
        """Routed experts no wider than the dense network."""
        return [] if shape is None else width_faults(self.config.expert_width, shape)

    def plan(self, shape: FFNShape, draws: Draws, statistics: Mapping[str, Tensor]) -> LayerPlan:
        """Dense weights in the shared expert, down projections of 0 in the routed ones."""
        experts = tuple(self._routed(shape, draws, e) for e in range(self.config.num_experts))
        return LayerPlan(experts, shared=ExpertPlan(shape.width, slice(0, shape.width)))

    def _routed(self, shape: FFNShape, draws: Draws, expert: int) -> ExpertPlan:
        F = self.config.expert_width or shape.width
        neurons_F: slice | Tensor = slice(0, F)
        drawn = None
        if self.config.routed == "drawn":
            all_F, none = torch.arange(F), torch.arange(0)
            where: dict[Matrix, Tensor] = {m: none if m == "down" else all_F for m in shape.matrices}
            drawn = Drawn(where, std=self.config.init_std)
        elif shape.width > F:
            neurons_F = torch.randperm(shape.width, generator=draws.generator("choice", expert))[:F]
        return ExpertPlan(F, neurons_F, scale={"down": 0.0}, drawn=drawn, down_bias=0.0)
