"""Options of `moe.routers.projection`."""

from __future__ import annotations

from dataclasses import dataclass

from moe.errors import require
from moe.routers.configs import RouterConfig


@dataclass(frozen=True)
class ProjectionConfig(RouterConfig):
    """Config that every router with a projection has."""

    top_k: int = 2
    """Experts per token; the mean, where it varies."""
    init_std: float = 0.02
    """Standard deviation of the initial router weights."""

    def __post_init__(self) -> None:
        require(
            self,
            (self.top_k >= 1, "top_k", "a token needs at least one expert", "Set it to 1 or more."),
            (
                self.init_std > 0,
                "init_std",
                "a router of zeros sends every token to the first experts",
                "Set it above 0; 0.02 is usual.",
            ),
        )
