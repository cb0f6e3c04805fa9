"""Dense to MoE: every method is found by being in a module of this package."""

from __future__ import annotations

from typing import Any

from moe.experts.weights import ExpertBank, FFNWeights
from moe.registry import discover
from moe.upcycle.base import UpcycleConfig, UpcycleMethod

__all__ = ["ExpertBank", "FFNWeights", "UpcycleConfig", "UpcycleMethod", "upcycle_methods"]


def upcycle_methods() -> dict[str, type[UpcycleMethod[Any]]]:
    """Every upcycling method by its name."""
    return discover(__name__, UpcycleMethod)
