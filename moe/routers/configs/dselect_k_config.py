"""Options of `moe.routers.dselect_k`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.errors import not_negative, require
from moe.routers.configs import RouterConfig
from moe.types import unless


@dataclass(frozen=True)
class DSelectKConfig(RouterConfig):
    """Config of `DSelectKRouter`."""

    name: Literal["dselect_k"] = "dselect_k"
    top_k: int = 2
    """Selectors: the most experts that a token uses once its bits are hard. Before that it uses up to all."""
    gate: Literal["per_example", "static"] = "per_example"
    """Gates that depend on the token, or one vector for all tokens (e.g. of a task)."""
    gamma: float = 1.0
    """Width of the band in which a bit is neither 0 nor 1."""
    entropy_coef: float = 0.1
    """Coefficient of the entropy of each selector, mean over tokens; 0 leaves it out. The paper's code
    sums over the batch: its coefficient is this one divided by the batch."""
    balance_coef: float = 0.0
    """Coefficient of the Switch balance loss, load measured in weight; 0 leaves it out. The paper has none;
    without it all tokens of a language model harden towards the same experts."""
    unreachable: Literal["renormalise", "penalise"] = "renormalise"
    """Treatment of codes without an expert, where E is no power of 2. ``renormalise``: at each bit, a half
    without experts gets nothing, so that weights sum to 1. ``penalise``: the paper's loss pushes mass away
    from such codes, and weights may sum to less than 1."""
    penalty_coef: float = 1.0
    """Coefficient of that loss; without effect under ``renormalise`` or where E is a power of 2."""

    def __post_init__(self) -> None:
        require(
            self,
            (self.top_k >= 1, "top_k", "a token needs at least one selector", "Set it to 1 or more."),
            (self.gamma > 0, "gamma", "the band has a width", "Set it above 0; 1 is usual."),
            *not_negative(self, "entropy_coef", "balance_coef", "penalty_coef"),
        )

    def idle(self) -> dict[str, str]:
        """Returns the options without effect; see `Config.idle`."""
        return unless(
            self.unreachable == "penalise", "unreachable=renormalise has no penalty", "penalty_coef"
        )
