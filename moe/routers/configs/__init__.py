"""Options of the routers, one module each, which imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from moe.types import Config


@dataclass(frozen=True)
class RouterConfig(Config):
    """Config that every router has: its name, which picks the class."""

    name: str
    """The router's name, as in ``conf/router/NAME.yaml``."""
