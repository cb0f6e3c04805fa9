"""Section of runs that go on training a mixture as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moe.errors import require
from recipes.config.sections import Section


@dataclass(frozen=True)
class ContinueConfig(Section):
    """Config of the losses and updates that balance a mixture which keeps its own router."""

    name: ClassVar[str] = "continue"
    balance_coef: float | None = None
    """Coefficient of the balance loss of each layer; None: as the family trains, where that is known, or as
    an export of Graft's was trained."""
    z_coef: float | None = None
    """Coefficient of the router z-loss. None: 0, or as an export of Graft's was trained."""
    bias_rate: float | None = None
    """Step size of the selection bias, for routers that have one; 0 freezes it. None: 0.001, or as an export
    of Graft's was trained."""

    def __post_init__(self) -> None:
        coefs = {"balance_coef": self.balance_coef, "z_coef": self.z_coef, "bias_rate": self.bias_rate}
        require(
            self,
            *(
                (value is None or value >= 0, name, "would pull the load apart", "Set it to 0 or more.")
                for name, value in coefs.items()
            ),
        )
