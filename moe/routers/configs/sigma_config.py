"""Options of `moe.routers.sigma`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from moe.errors import not_negative, require
from moe.routers.configs.projection_config import ProjectionConfig
from moe.types import unless


@dataclass(frozen=True)
class SigmaConfig(ProjectionConfig):
    """Config of `SigmaRouter`."""

    varies_top_k: ClassVar[bool] = True

    name: Literal["sigma"] = "sigma"
    top_k: int = 1
    """Experts per token."""
    top1_coef: float = 0.01
    """Coefficient of the Top-1 balance loss; 0 leaves it out."""
    temperature: float = 0.1
    """Divisor of the logits in the loss. At 1 the loss asks for sharper gates than tasks may want."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            *not_negative(self, "top1_coef"),
            (self.temperature > 0, "temperature", "logits are divided by it", "Set it above 0."),
        )

    def idle(self) -> dict[str, str]:
        """Returns the options without effect; see `Config.idle`."""
        return unless(self.top1_coef > 0, "top1_coef is 0", "temperature")
