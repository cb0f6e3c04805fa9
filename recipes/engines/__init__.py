"""Engines: ``recipes/engines/NAME/NAME_engine.py`` holds the class, and is found by that name."""

from __future__ import annotations

from typing import Any

from moe.registry import discover
from recipes.engines.base import Engine, EngineConfig, TrainModule
from recipes.engines.micro_batch import MicroBatch

__all__ = ["Engine", "EngineConfig", "MicroBatch", "TrainModule", "engine_classes"]


def engine_classes() -> dict[str, type[Engine[Any]]]:
    """Returns every engine class by its name."""
    return discover(__name__, Engine, "{name}.{name}_engine")
