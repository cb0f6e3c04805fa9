"""Dispatchers, found by being in a module of this package."""

from __future__ import annotations

from moe.dispatch.base import Dispatched, Dispatcher, DispatchHandle
from moe.registry import discover

__all__ = ["DispatchHandle", "Dispatched", "Dispatcher", "dispatcher_classes"]


def dispatcher_classes() -> dict[str, type[Dispatcher]]:
    """Every dispatcher class by its name."""
    return discover(__name__, Dispatcher)
