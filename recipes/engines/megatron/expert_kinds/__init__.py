"""Kinds of experts in Megatron's layers; every module of this package is searched for them."""

from __future__ import annotations

from moe.registry import discover
from recipes.engines.megatron.expert_kinds.base import ExpertKind, ExpertTensor

__all__ = ["ExpertKind", "ExpertTensor", "expert_kinds"]


def expert_kinds() -> dict[str, type[ExpertKind]]:
    """Returns every kind by the value of ``engine.experts`` that picks it."""
    return discover(__name__, ExpertKind)
