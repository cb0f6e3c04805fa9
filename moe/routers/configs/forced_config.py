"""Options of `moe.routers.forced`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from moe.routers.configs.linear_config import LinearRouterConfig


@dataclass(frozen=True)
class ForcedConfig(LinearRouterConfig):
    """Config of `ForcedRouter`."""

    varies_top_k: ClassVar[bool] = True

    name: Literal["forced"] = "forced"
    balance_coef: float = 0.0
    """Coefficient of the Switch balance loss, to measure its cost; its value is nearly constant here."""
