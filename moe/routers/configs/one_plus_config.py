"""Options of `moe.routers.one_plus`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.routers.configs.linear_config import LinearRouterConfig


@dataclass(frozen=True)
class OnePlusConfig(LinearRouterConfig):
    """Config of `OnePlusRouter`."""

    name: Literal["one_plus"] = "one_plus"
    init_std: float = 1e-3
    """Standard deviation of the projection that breaks ties; the router's own weights begin at 0."""
