"""Options of `moe.routers.comet`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.errors import not_negative, require
from moe.routers.configs import RouterConfig


@dataclass(frozen=True)
class CometConfig(RouterConfig):
    """Config of `CometRouter`."""

    name: Literal["comet"] = "comet"
    top_k: int = 2
    """Trees: the most experts that a token uses once its nodes are hard. Before that it uses up to all."""
    gamma: float = 1.0
    """Width of the band in which a node sends a token both ways; with a wider band trees harden later."""
    entropy_coef: float = 0.1
    """Coefficient of the entropy of each tree's leaves, which drives nodes to 0 or 1; 0 leaves it out."""
    balance_coef: float = 0.0
    """Coefficient of the Switch balance loss, load measured in weight; 0 leaves it out. The paper has none;
    without it all tokens of a language model harden towards the same experts."""

    def __post_init__(self) -> None:
        require(
            self,
            (self.top_k >= 1, "top_k", "a token needs at least one tree", "Set it to 1 or more."),
            (self.gamma > 0, "gamma", "the band has a width", "Set it above 0; 1 is usual."),
            *not_negative(self, "entropy_coef", "balance_coef"),
        )
