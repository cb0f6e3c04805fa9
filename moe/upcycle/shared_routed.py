"""Shared and fine-grained routed experts as in DeepSeekMoE (arXiv 2401.06066), exact out of a dense network.

The dense neurons are cut into G shards. S of them become one expert that every token uses; the other
``G - S`` are copied into virtual groups (`moe.upcycle.virtual_group`), whose factor is ``G - S`` where
weights sum to 1. Which neurons are shared is open: the first, or those that are active most often, as in
CMoE (arXiv 2502.04416).

The construction is ours, out of these sources.

Letters: E experts, F width, G shards, S shared ones, K experts a token.
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
from moe.upcycle.gates import observe
from moe.upcycle.layer_plan import Draws, ExpertPlan, FFNShape, LayerPlan, Matrix, RouterStart
from moe.upcycle.router_faults import group_faults, sum_faults

_RATE = "activation_rate_F"


@dataclass(frozen=True)
class SharedRoutedConfig(UpcycleConfig):
    """Config of `SharedRouted`."""

    name: Literal["shared_routed"] = "shared_routed"
    granularity: int = 4
    """G, shards that the dense network is cut into: experts are as many times narrower."""
    num_shared: int = 2
    """S, shards that every token uses. The other G - S are the experts of a virtual group."""
    order: Literal["contiguous", "activation_rate"] = "contiguous"
    """Which neurons are shared: the first in the dense network, or those that are among the most active
    of a token most often, as measured on the run's text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            (
                1 <= self.num_shared < self.granularity,
                "num_shared",
                f"of granularity={self.granularity} shards at least one is shared and at least one routed",
                "Set it from 1 to granularity - 1.",
            ),
        )

    @property
    def group_size(self) -> int:
        """Experts of a virtual group, ``G - S``."""
        return self.granularity - self.num_shared


class SharedRouted(UpcycleMethod[SharedRoutedConfig]):
    """Some shards for every token, virtual groups of the others."""

    name = "shared_routed"
    config_class = SharedRoutedConfig
    starts_router = True

    @property
    def statistics(self) -> tuple[str, ...]:
        """Activation rates where they decide."""
        return (_RATE,) if self.config.order == "activation_rate" else ()

    def is_exact(self, router: Router[Any]) -> bool:
        """Under weights of one sum and a router that keeps ties."""
        faults = group_faults(router.config, router.num_experts, self.config.group_size)
        return not faults and observe(router.config, router.num_experts).constant

    def check(self, router: RouterConfig, shape: FFNShape | None) -> list[Mistake]:
        """Shards of one width, whole groups for every token, and a factor that can be told."""
        G = self.config.granularity
        found = group_faults(router, self.config.num_experts, self.config.group_size)
        if shape is not None and shape.width % G:
            rule = f"the {shape.width} neurons of the dense network do not divide into so many shards"
            found.append(Mistake("upcycle.granularity", G, rule, "Set a divisor."))
        gates = observe(router, self.config.num_experts)
        return found + sum_faults(router, gates, "upcycle=shared_dense")

    def plan(self, shape: FFNShape, draws: Draws, statistics: Mapping[str, Tensor]) -> LayerPlan:
        """The shared shards side by side in one expert, the others one after the other in groups."""
        size, width = self.config.group_size, shape.width // self.config.granularity
        shared_F, routed_F = self._cut(shape.width, self.config.num_shared * width, statistics)
        # The dense bias stands with the shared expert, whose weight is 1 whatever the router does.
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
        """Shared and routed neurons, each in the order of the dense network."""
        if self.config.order == "contiguous":
            return torch.arange(count), torch.arange(count, width)
        order_F = statistics[_RATE].argsort(descending=True, stable=True).cpu()
        return order_F[:count].sort().values, order_F[count:].sort().values
