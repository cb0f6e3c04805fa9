"""Methods that upcycle dense networks to MoEs; every module of this package is searched for them."""

from __future__ import annotations

from typing import Any

from moe.experts.weights import ExpertBank, FFNWeights
from moe.registry import discover
from moe.upcycle.base import UpcycleConfig, UpcycleMethod

__all__ = ["ExpertBank", "FFNWeights", "UpcycleConfig", "UpcycleMethod", "upcycle_method", "upcycle_methods"]


def upcycle_methods() -> dict[str, type[UpcycleMethod[Any]]]:
    """Returns every upcycling method by its name."""
    return discover(__name__, UpcycleMethod)


def upcycle_method(config: UpcycleConfig) -> UpcycleMethod[Any]:
    """Returns the method that a config names."""
    return upcycle_methods()[config.name](config)
