"""Options of `moe.routers.s_base`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.errors import require
from moe.routers.configs.projection_config import ProjectionConfig


@dataclass(frozen=True)
class SBaseConfig(ProjectionConfig):
    """Config of `SBaseRouter`."""

    name: Literal["s_base"] = "s_base"
    top_k: int = 1
    """Experts per token."""
    iterations: int = 3
    """Sinkhorn iterations, always all of them, so that the host never waits for the device."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            (self.iterations >= 1, "iterations", "without one nothing is balanced", "Set it to 1 or more."),
        )
