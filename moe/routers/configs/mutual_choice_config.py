"""Options of `moe.routers.mutual_choice`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.errors import not_negative, require
from moe.routers.configs.projection_config import ProjectionConfig


@dataclass(frozen=True)
class MutualChoiceConfig(ProjectionConfig):
    """Config of `MutualChoiceRouter`. ``top_k`` times the tokens is the budget of a micro-batch."""

    name: Literal["mutual_choice"] = "mutual_choice"
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Score function over the logits, by which pairs are chosen and weighed."""
    at_least_one: bool = True
    """Give a token without an expert its best one, on top of the budget."""
    balance_coef: float = 0.01
    """Coefficient of the Switch balance loss; 0 leaves it out."""
    decay: float = 0.99
    """Share of the old threshold that a step keeps. Only evaluation uses the threshold."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            *not_negative(self, "balance_coef"),
            (
                0 <= self.decay < 1,
                "decay",
                "a threshold keeps a share of itself that is below 1",
                "Set it to 0.99.",
            ),
        )
