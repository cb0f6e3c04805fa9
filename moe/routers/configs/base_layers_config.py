"""Options of `moe.routers.base_layers`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.errors import require
from moe.routers.configs import RouterConfig


@dataclass(frozen=True)
class BaseLayersConfig(RouterConfig):
    """Config of `BaseLayersRouter`."""

    name: Literal["base_layers"] = "base_layers"
    init_gain: float = 0.1
    """Gain of the orthogonal initial expert embeddings."""
    max_rounds: int = 100
    """Upper bound on rounds of bidding, after which the remaining tokens are placed greedily."""

    def __post_init__(self) -> None:
        require(
            self,
            (
                self.init_gain > 0,
                "init_gain",
                "a router of zeros cannot tell experts apart",
                "Set it above 0; 0.1 is the published value.",
            ),
            (self.max_rounds >= 0, "max_rounds", "it counts rounds", "Set it to 0 or more."),
        )
