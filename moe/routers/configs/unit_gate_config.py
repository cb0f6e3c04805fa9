"""Options of `moe.routers.unit_gate`."""

from __future__ import annotations

from dataclasses import dataclass

from moe.errors import require
from moe.routers.configs import RouterConfig


@dataclass(frozen=True)
class UnitGateConfig(RouterConfig):
    """Config that every unit-gate router has."""

    top_k: int = 2
    """Experts per token."""
    init_std: float = 0.02
    """Standard deviation of the rows where no upcycling method sets them."""
    bias_rate: float = 1e-3
    """Step size of the bias that evens out load; 0 leaves the bias at 0."""
    balance_coef: float = 1e-4
    """Coefficient of the Switch balance loss, the only loss that trains the rows while u is 0; 0 leaves it
    out."""

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
            *(
                (getattr(self, name) >= 0, name, "it would favour the loaded experts", "Set it to 0 or more.")
                for name in ("bias_rate", "balance_coef")
            ),
        )
