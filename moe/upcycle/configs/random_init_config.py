"""Options of `moe.upcycle.random_init`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.errors import require
from moe.upcycle.configs import UpcycleConfig


@dataclass(frozen=True)
class RandomConfig(UpcycleConfig):
    """Config of `Random`."""

    name: Literal["random"] = "random"
    init_std: float = 0.02
    """Standard deviation of the weights."""
    expert_width: int | None = None
    """F of an expert; None takes the width of the dense network."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            (self.init_std > 0, "init_std", "experts of zeros stay equal", "Set it above 0; 0.02 is usual."),
            (
                self.expert_width is None or self.expert_width >= 1,
                "expert_width",
                "must be at least 1",
                "Or leave it at null.",
            ),
        )
