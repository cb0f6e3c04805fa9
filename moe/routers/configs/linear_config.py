"""Options of `moe.routers.linear`."""

from __future__ import annotations

from dataclasses import dataclass

from moe.errors import not_negative, require
from moe.routers.configs.projection_config import ProjectionConfig
from moe.routing.scope import BalanceScope
from moe.types import unless


@dataclass(frozen=True)
class LinearRouterConfig(ProjectionConfig):
    """Config that every linear router with balance losses has."""

    balance_coef: float = 0.01
    """Coefficient of the Switch balance loss; 0 leaves it out."""
    balance_scope: BalanceScope = "micro_batch"
    """Tokens over which load and importance are counted: the micro-batch of all ranks, each sequence by
    itself, or all micro-batches of the step so far."""
    importance_coef: float = 0.0
    """Coefficient of the squared coefficient of variation of the experts' summed probabilities; 0 leaves it
    out. See `moe.routing.load_importance`."""
    z_coef: float = 0.0
    """Coefficient of the router z-loss; 0 leaves it out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            *not_negative(self, "balance_coef", "importance_coef", "z_coef"),
        )

    def idle(self) -> dict[str, str]:
        """Returns the options without effect; see `Config.idle`."""
        return unless(
            self.balance_coef > 0 or self.importance_coef > 0, "load balancing is off", "balance_scope"
        )
