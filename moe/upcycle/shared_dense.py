"""Dense network as an expert that every token uses; the routed experts begin at zero.

It is exact at step 0 for any router and any sum of weights: the routed experts' down projections are 0. In
the first step only these get a gradient; router and up projections follow once they have moved.

Letters: E experts, F width of the dense network or of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe.routers.base import Router
from moe.upcycle.base import UpcycleMethod
from moe.upcycle.configs.shared_dense_config import SharedDenseConfig
from moe.upcycle.dense_shape import FFNShape, Matrix
from moe.upcycle.layer_plan import Drawn, Draws, ExpertPlan, LayerPlan


class SharedDense(UpcycleMethod[SharedDenseConfig]):
    """Method with the dense network as shared expert, and routed experts whose output is 0."""

    name = "shared_dense"
    config_class = SharedDenseConfig

    def is_exact(self, router: Router[Any]) -> bool:
        """Returns True: nothing is added to the dense network's output."""
        return True

    def plan(self, shape: FFNShape, draws: Draws, statistics: Mapping[str, Tensor]) -> LayerPlan:
        """Plans dense weights in the shared expert, and down projections of 0 in the routed ones."""
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
