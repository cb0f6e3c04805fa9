"""Shared and fine-grained routed experts as in DeepSeekMoE (arXiv 2401.06066), exact from a dense network.

The dense neurons are cut into G shards. S of them become one expert that every token uses; the other ``G -
S`` are copied into virtual groups (`moe.upcycle.virtual_group`), whose factor is ``G - S`` if weights sum to
1. The shared neurons are the first, or those that are active most often, as in CMoE (arXiv 2502.04416).

The construction is ours, based on these sources.

Letters: E experts, F width, G shards, S shared ones, K experts a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe.errors import Mistake
from moe.routers.base import Router
from moe.routers.configs import RouterConfig
from moe.upcycle.base import UpcycleMethod
from moe.upcycle.configs.shared_routed_config import SharedRoutedConfig
from moe.upcycle.dense_shape import FFNShape, Matrix
from moe.upcycle.gates import observe
from moe.upcycle.layer_plan import Draws, ExpertPlan, LayerPlan, RouterStart
from moe.upcycle.router_faults import group_faults, observed_group_faults, sum_faults

_RATE = "activation_rate_F"


class SharedRouted(UpcycleMethod[SharedRoutedConfig]):
    """Method with some shards for every token, and virtual groups of the others."""

    name = "shared_routed"
    config_class = SharedRoutedConfig

    @property
    def statistics(self) -> tuple[str, ...]:
        """Activation rates, if they decide."""
        return (_RATE,) if self.config.order == "activation_rate" else ()

    def is_exact(self, router: Router[Any]) -> bool:
        """Returns True if weights have a constant sum and the router keeps ties."""
        faults = group_faults(router.config, router.num_experts, self.config.group_size)
        return not faults and observe(router.config, router.num_experts).constant

    def check_router(self, router: RouterConfig) -> list[Mistake]:
        """Requires a router that keeps groups together, and a known factor."""
        E = self.config.num_experts
        found = observed_group_faults(router, E, self.config.group_size)
        return found + sum_faults(router, observe(router, E), "upcycle=shared_dense")

    def plan(self, shape: FFNShape, draws: Draws, statistics: Mapping[str, Tensor]) -> LayerPlan:
        """Joins the shared shards in one expert, and deals the others into groups."""
        size, width = self.config.group_size, shape.width // self.config.granularity
        shared_F, routed_F = self._cut(shape.width, self.config.num_shared * width, statistics)
        # The dense bias goes to the shared expert, whose weight is always 1.
        scale: dict[Matrix, float] = {"down": size / self.gates.weight_sum}
        shards = [
            ExpertPlan(width, routed_F[g * width : (g + 1) * width], scale=scale, down_bias=0.0)
            for g in range(size)
        ]
        return LayerPlan(
            tuple(shards * (self.config.num_experts // size)),
            shared=ExpertPlan(len(shared_F), shared_F),
            router=RouterStart(group_size=size),
        )

    def _cut(self, width: int, count: int, statistics: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns shared and routed neurons, each in the order of the dense network."""
        if self.config.order == "contiguous":
            return torch.arange(count), torch.arange(count, width)
        order_F = statistics[_RATE].argsort(descending=True, stable=True).cpu()
        return order_F[:count].sort().values, order_F[count:].sort().values
