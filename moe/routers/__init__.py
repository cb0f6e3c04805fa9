"""Every router of the field behind one contract. A router is found by being in a module of this package."""

from __future__ import annotations

from typing import Any

from moe.registry import discover
from moe.routers.base import Router, RouterConfig

__all__ = ["Router", "RouterConfig", "router_class", "router_classes"]


def router_classes() -> dict[str, type[Router[Any]]]:
    """Every router class by its name."""
    return discover(__name__, Router)


def router_class(name: str) -> type[Router[Any]]:
    """The router class of a name.

    Raises:
        KeyError: No router has this name; the message lists those there are.
    """
    classes = router_classes()
    if name not in classes:
        raise KeyError(f"no router is called {name!r}; there are: {', '.join(sorted(classes))}")
    return classes[name]
