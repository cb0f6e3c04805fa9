"""Options of `moe.routers.mod`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from moe.errors import not_negative, require
from moe.routers.configs.projection_config import ProjectionConfig


@dataclass(frozen=True)
class MoDConfig(ProjectionConfig):
    """Config of `MoDRouter`. ``top_k`` holds for the tokens taken; the others use no expert."""

    varies_top_k: ClassVar[bool] = True

    name: Literal["mod"] = "mod"
    top_k: int = 1
    """Experts per token that is taken."""
    capacity: float = 0.125
    """Share of each sequence's tokens that is taken."""
    gate: Literal["linear", "sigmoid"] = "linear"
    """Factor on the experts' output: the score of taking the token (paper), or its sigmoid."""
    balance_coef: float = 0.01
    """Coefficient of the Switch balance loss over the tokens taken; 0 leaves it out."""
    predictor_coef: float = 0.01
    """Coefficient of the predictor's cross-entropy. It trains the predictor alone: tokens are detached."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            (
                0 < self.capacity <= 1,
                "capacity",
                "it is a share of the tokens",
                "Set it above 0, to 1 at most.",
            ),
            *not_negative(self, "balance_coef", "predictor_coef"),
        )
