"""Fine-grained experts in virtual groups, exact at step 0 however narrow they are (arXiv 2410.07524).

The dense neurons are cut into G shards; ``E / G`` groups hold one copy of every shard each, and the experts
of a group share one router row. Their logits tie, so that a token uses whole groups, i.e. whole copies: with
K experts it uses ``K / G`` of them. The total weight of K experts is then spread over G shards, each of which
should count once; a factor compensates: G if weights sum to 1.

Letters: E experts, F width, G shards of a copy, K experts a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moe.errors import Mistake
from moe.routers.base import Router
from moe.routers.configs import RouterConfig
from moe.upcycle.base import UpcycleMethod
from moe.upcycle.configs.virtual_group_config import VirtualGroupConfig
from moe.upcycle.dense_shape import FFNShape, Matrix
from moe.upcycle.gates import observe
from moe.upcycle.layer_plan import Draws, ExpertPlan, LayerPlan, RouterStart
from moe.upcycle.router_faults import group_faults, observed_group_faults, sum_faults

# Activation in which a factor on the input counts twice, as with a gate.
_QUADRATIC = "relu2"


class VirtualGroup(UpcycleMethod[VirtualGroupConfig]):
    """Method that cuts copies into shards; the experts of a copy share a router row."""

    name = "virtual_group"
    config_class = VirtualGroupConfig

    def is_exact(self, router: Router[Any]) -> bool:
        """Returns True with the factor on the down projection, a constant sum of weights and kept ties."""
        gates = observe(router.config, router.num_experts)
        return (
            gates.constant
            and (self.config.scale == "down" or gates.total == self.config.granularity)
            and not group_faults(router.config, router.num_experts, self.config.granularity)
        )

    def check_router(self, router: RouterConfig) -> list[Mistake]:
        """Requires a router that keeps groups together, and a known factor."""
        found = observed_group_faults(router, self.config.num_experts, self.config.granularity)
        if self.config.scale != "none":
            found += sum_faults(router, observe(router, self.config.num_experts), "upcycle.scale=none")
        return found

    def plan(self, shape: FFNShape, draws: Draws, statistics: Mapping[str, Tensor]) -> LayerPlan:
        """Gives expert n shard ``n % G`` of copy ``n // G``."""
        G = self.config.granularity
        width = shape.width // G
        scale = {} if self.config.scale == "none" else self._scale(shape, G / self.gates.weight_sum)
        bias = 1.0 / (self.gates.total or 1.0)
        shards = [
            ExpertPlan(width, slice(g * width, (g + 1) * width), scale=scale, down_bias=bias)
            for g in range(G)
        ]
        return LayerPlan(tuple(shards * (self.config.num_experts // G)), router=RouterStart(group_size=G))

    def _scale(self, shape: FFNShape, factor: float) -> dict[Matrix, float]:
        if self.config.scale == "down":
            return {"down": factor}
        root = 1 / 3 if shape.gated or shape.activation == _QUADRATIC else 1 / 2
        return dict.fromkeys(shape.matrices, factor**root)
