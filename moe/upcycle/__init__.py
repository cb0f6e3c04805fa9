"""Methods that upcycle dense networks to MoEs; every module of this package is searched for them.

Their configs stand in `moe.upcycle.configs`, so that options are read without importing torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe.registry import discover
from moe.upcycle.configs import UpcycleConfig

if TYPE_CHECKING:
    from moe.upcycle.base import UpcycleMethod

__all__ = ["upcycle_configs", "upcycle_method", "upcycle_methods"]


def upcycle_methods() -> dict[str, type[UpcycleMethod[Any]]]:
    """Returns every upcycling method by its name."""
    from moe.upcycle.base import UpcycleMethod

    return discover(__name__, UpcycleMethod)


def upcycle_configs() -> dict[str, type[UpcycleConfig]]:
    """Returns the config class of every method by the method's name, without importing torch."""
    return discover(f"{__name__}.configs", UpcycleConfig)


def upcycle_method(config: UpcycleConfig) -> UpcycleMethod[Any]:
    """Returns the method that a config names."""
    return upcycle_methods()[config.name](config)
