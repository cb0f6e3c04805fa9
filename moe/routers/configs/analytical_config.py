"""Options of `moe.routers.analytical`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.routers.configs.unit_gate_config import UnitGateConfig


@dataclass(frozen=True)
class AnalyticalConfig(UnitGateConfig):
    """Config of `AnalyticalRouter`."""

    name: Literal["analytical"] = "analytical"
