"""Fine-grained experts by virtual groups: exact at step 0, however narrow the experts are (arXiv 2410.07524).

The dense neurons are cut into G shards; ``E / G`` groups hold one copy of every shard each, and the experts
of a group share one router row. Their logits tie, so that a token uses whole groups, that is whole copies:
with K experts it uses ``K / G`` of them. What K experts weigh together is then spread over G shards of
which each should count once, and a factor makes up for it: G where weights sum to 1.

Letters: E experts, F width, G shards of a copy, K experts a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from moe.errors import Mistake, require
from moe.routers.base import Router, RouterConfig
from moe.upcycle.base import UpcycleConfig, UpcycleMethod
from moe.upcycle.gates import observe
from moe.upcycle.layer_plan import Draws, ExpertPlan, FFNShape, LayerPlan, Matrix, RouterStart
from moe.upcycle.router_faults import group_faults, sum_faults

# Its factor counts twice on the input, once on the output, as with a gate.
_QUADRATIC = "relu2"


@dataclass(frozen=True)
class VirtualGroupConfig(UpcycleConfig):
    """Config of `VirtualGroup`."""

    name: Literal["virtual_group"] = "virtual_group"
    granularity: int = 2
    """G, shards that each copy of the dense network is cut into: experts are as many times narrower, and
    a token uses as many times more of them for the same arithmetic. 1 makes copies with a factor."""
    scale: Literal["down", "cube_root", "none"] = "down"
    """Where the factor goes: onto the down projection, which is exact; its cube root onto all three matrices
    (its square root onto both of a network without a gate), which trained better in the paper and is not
    exact; or nowhere."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            (self.granularity >= 1, "granularity", "a copy is at least one shard", "Set it to 1 or more."),
        )


class VirtualGroup(UpcycleMethod[VirtualGroupConfig]):
    """Copies cut into shards; the experts of a copy share a router row."""

    name = "virtual_group"
    config_class = VirtualGroupConfig
    starts_router = True

    def is_exact(self, router: Router[Any]) -> bool:
        """With the factor on the down projection, under weights of one sum and a router that keeps ties."""
        gates = observe(router.config, router.num_experts)
        return (
            gates.constant
            and (self.config.scale == "down" or gates.total == self.config.granularity)
            and not group_faults(router.config, router.num_experts, self.config.granularity)
        )

    def check(self, router: RouterConfig, shape: FFNShape | None) -> list[Mistake]:
        """Shards of one width, whole groups for every token, and a factor that can be told."""
        G = self.config.granularity
        found = group_faults(router, self.config.num_experts, G)
        if shape is not None and shape.width % G:
            rule = f"the {shape.width} neurons of the dense network do not divide into so many shards"
            found.append(Mistake("upcycle.granularity", G, rule, "Set a divisor."))
        if self.config.scale != "none":
            found += sum_faults(router, observe(router, self.config.num_experts), "upcycle.scale=none")
        return found

    def plan(self, shape: FFNShape, draws: Draws, statistics: Mapping[str, Tensor]) -> LayerPlan:
        """Expert n holds shard ``n % G`` of copy ``n // G``."""
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
