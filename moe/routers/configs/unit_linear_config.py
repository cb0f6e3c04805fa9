"""Options of `moe.routers.unit_linear`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.routers.configs.unit_gate_config import UnitGateConfig


@dataclass(frozen=True)
class UnitLinearConfig(UnitGateConfig):
    """Config of `UnitLinearRouter`."""

    name: Literal["unit_linear"] = "unit_linear"
