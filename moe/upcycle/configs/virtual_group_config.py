"""Options of `moe.upcycle.virtual_group`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from moe.errors import Mistake, require
from moe.routers.configs import RouterConfig
from moe.upcycle.configs import UpcycleConfig
from moe.upcycle.dense_shape import FFNShape, division_mistakes
from moe.upcycle.group_rules import group_mistakes


@dataclass(frozen=True)
class VirtualGroupConfig(UpcycleConfig):
    """Config of `VirtualGroup`."""

    starts_router: ClassVar[bool] = True
    name: Literal["virtual_group"] = "virtual_group"
    granularity: int = 2
    """G, shards that each copy of the dense network is cut into: experts are G times narrower, and a token
    uses G times more of them for the same arithmetic. 1 makes copies with a factor."""
    scale: Literal["down", "cube_root", "none"] = "down"
    """Place of the factor: the down projection, which is exact; its cube root on all three matrices (its
    square root on both matrices without a gate), which trained better in the paper but is not exact; or
    none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            (self.granularity >= 1, "granularity", "a copy is at least one shard", "Set it to 1 or more."),
        )

    def check(self, router: RouterConfig, shape: FFNShape | None) -> list[Mistake]:
        """Requires shards of one width, and whole groups for every token."""
        G = self.granularity
        found = group_mistakes(router, self.num_experts, G)
        return found + division_mistakes(shape, G, "granularity", G, "Set a divisor.")
