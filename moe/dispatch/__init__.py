"""Dispatchers between tokens and experts; every module of this package is searched for them."""

from __future__ import annotations

from moe.dispatch.base import Dispatched, Dispatcher, DispatchHandle
from moe.registry import discover

__all__ = ["DispatchHandle", "Dispatched", "Dispatcher", "dispatcher_classes"]


def dispatcher_classes() -> dict[str, type[Dispatcher]]:
    """Returns every dispatcher class by its name."""
    return discover(__name__, Dispatcher)
