"""Criteria by which experts are kept, one module each."""

from __future__ import annotations

from moe.registry import discover
from recipes.upcycling.prune.criteria.base import Criterion

__all__ = ["Criterion", "criteria"]


def criteria() -> dict[str, Criterion]:
    """Returns every criterion by name."""
    return {name: cls() for name, cls in discover(__name__, Criterion).items()}
