"""Families of mixtures that transformers has and Graft takes as input, one module each."""

from __future__ import annotations

from moe.registry import discover
from recipes.models.families.base import MoEFamily

__all__ = ["MoEFamily", "families"]


def families() -> dict[str, MoEFamily]:
    """Returns every family by the ``model_type`` of its configs."""
    return {name: cls() for name, cls in discover(__name__, MoEFamily).items()}
