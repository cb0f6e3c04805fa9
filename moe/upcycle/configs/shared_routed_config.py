"""Options of `moe.upcycle.shared_routed`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from moe.errors import Mistake, require
from moe.routers.configs import RouterConfig
from moe.upcycle.configs import UpcycleConfig
from moe.upcycle.dense_shape import FFNShape, division_mistakes
from moe.upcycle.group_rules import group_mistakes


@dataclass(frozen=True)
class SharedRoutedConfig(UpcycleConfig):
    """Config of `SharedRouted`."""

    starts_router: ClassVar[bool] = True
    name: Literal["shared_routed"] = "shared_routed"
    granularity: int = 4
    """G, shards that the dense network is cut into: experts are G times narrower."""
    num_shared: int = 2
    """S, shards that every token uses. The other G - S form the experts of a virtual group."""
    order: Literal["contiguous", "activation_rate"] = "contiguous"
    """Shared neurons: the first in the dense network, or those most often among a token's most active ones,
    as measured on the run's text."""

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

    def check(self, router: RouterConfig, shape: FFNShape | None) -> list[Mistake]:
        """Requires shards of one width, and whole groups for every token."""
        G, found = self.granularity, group_mistakes(router, self.num_experts, self.group_size)
        return found + division_mistakes(shape, G, "granularity", G, "Set a divisor.")

    @property
    def group_size(self) -> int:
        """Experts of a virtual group, ``G - S``."""
        return self.granularity - self.num_shared
