"""Options of `moe.upcycle.shuffle_slice`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.errors import Mistake, require
from moe.routers.configs import RouterConfig
from moe.upcycle.configs import UpcycleConfig
from moe.upcycle.dense_shape import FFNShape, width_mistakes


@dataclass(frozen=True)
class ShuffleSliceConfig(UpcycleConfig):
    """Config of `ShuffleSlice`."""

    name: Literal["shuffle_slice"] = "shuffle_slice"
    expert_width: int | None = None
    """F of an expert, at most the dense network's; None takes half of the dense network's."""
    ratio: float = 0.5
    """Share of each expert's neurons that are drawn anew."""

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
            (0 <= self.ratio <= 1, "ratio", "it is a share of the neurons", "Set it from 0 to 1."),
        )

    def check(self, router: RouterConfig, shape: FFNShape | None) -> list[Mistake]:
        """Requires experts no wider than the dense network."""
        return width_mistakes(shape, self.expert_width)
