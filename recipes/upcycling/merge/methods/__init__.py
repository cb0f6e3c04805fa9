"""Methods by which experts are merged, one module each."""

from __future__ import annotations

from moe.registry import discover
from recipes.upcycling.merge.methods.base import MergeMethod

__all__ = ["MergeMethod", "merge_methods"]


def merge_methods() -> dict[str, MergeMethod]:
    """Returns every method by name."""
    return {name: cls() for name, cls in discover(__name__, MergeMethod).items()}
