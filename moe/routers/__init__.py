"""Routers behind one contract; every module of this package is searched for them.

Their configs stand in `moe.routers.configs`, so that options are read without importing torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe.registry import discover
from moe.routers.configs import RouterConfig

if TYPE_CHECKING:
    from moe.routers.base import Router

__all__ = ["router_class", "router_classes", "router_configs"]


def router_classes() -> dict[str, type[Router[Any]]]:
    """Returns every router class by its name."""
    from moe.routers.base import Router

    return discover(__name__, Router)


def router_configs() -> dict[str, type[RouterConfig]]:
    """Returns the config class of every router by the router's name, without importing torch."""
    return discover(f"{__name__}.configs", RouterConfig)


def router_class(name: str) -> type[Router[Any]]:
    """Returns the router class with a name.

    Raises:
        KeyError: No router has this name; the message lists the known ones.
    """
    classes = router_classes()
    if name not in classes:
        raise KeyError(f"no router is called {name!r}; there are: {', '.join(sorted(classes))}")
    return classes[name]
