"""Dispatchers, found by being in a module of this package."""

from __future__ import annotations

from moe.dispatch.base import Arrival, Dispatched, Dispatcher
from moe.registry import discover

__all__ = ["Arrival", "Dispatched", "Dispatcher", "dispatcher_classes"]


def dispatcher_classes() -> dict[str, type[Dispatcher]]:
    """Every dispatcher class by its name."""
    return discover(__name__, Dispatcher)
