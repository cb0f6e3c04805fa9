"""Options of `moe.upcycle.snake`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.errors import Mistake, at_least, require
from moe.routers.configs import RouterConfig
from moe.upcycle.configs import UpcycleConfig
from moe.upcycle.dense_shape import FFNShape, division_mistakes


@dataclass(frozen=True)
class SnakeConfig(UpcycleConfig):
    """Config of `Snake`."""

    name: Literal["snake"] = "snake"
    num_shared: int = 0
    """Width of the shared expert of the most important neurons, in widths of a routed one; 0 for none."""
    importance: Literal["output", "gradient"] = "output"
    """``output``: mean of ``|h_i * mean_d W2[d, i]|``, like the source. ``gradient``: of ``|h * dL/dh|``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, *at_least(self, 0, "num_shared"))

    def check(self, router: RouterConfig, shape: FFNShape | None) -> list[Mistake]:
        """Requires parts of one width."""
        remedy = "Set another number, or another num_shared."
        parts = self.num_experts + self.num_shared
        return division_mistakes(shape, parts, "num_experts", self.num_experts, remedy)
