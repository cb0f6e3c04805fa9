"""Shares of the experts in the dense network, one module each."""

from __future__ import annotations

from moe.registry import discover
from recipes.upcycling.densify.shares.base import Shares

__all__ = ["Shares", "all_shares"]


def all_shares() -> dict[str, Shares]:
    """Returns every way to share by name."""
    return {name: cls() for name, cls in discover(__name__, Shares).items()}
