"""Options of `moe.upcycle.snake`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.errors import at_least, require
from moe.upcycle.configs import UpcycleConfig


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
