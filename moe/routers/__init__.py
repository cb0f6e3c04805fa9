"""Routers behind one contract; every module of this package is searched for them."""

from __future__ import annotations

from typing import Any

from moe.registry import discover
from moe.routers.base import Router, RouterConfig

__all__ = ["Router", "RouterConfig", "router_class", "router_classes"]


def router_classes() -> dict[str, type[Router[Any]]]:
    """Returns every router class by its name."""
    return discover(__name__, Router)


def router_class(name: str) -> type[Router[Any]]:
    """Returns the router class with a name.

    Raises:
        KeyError: No router has this name; the message lists the known ones.
    """
    classes = router_classes()
    if name not in classes:
        raise KeyError(f"no router is called {name!r}; there are: {', '.join(sorted(classes))}")
    return classes[name]
