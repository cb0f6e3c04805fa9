"""Engines: ``recipes/engines/NAME/NAME_engine.py`` holds the class, and is found by that name.

``recipes/engines/NAME/config.py`` holds its options, which are read without importing torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe.registry import discover
from recipes.engines.config import EngineConfig

if TYPE_CHECKING:
    from recipes.engines.base import Engine

__all__ = ["engine_classes", "engine_configs"]


def engine_classes() -> dict[str, type[Engine[Any]]]:
    """Returns every engine class by its name."""
    from recipes.engines.base import Engine

    return discover(__name__, Engine, "{name}.{name}_engine")


def engine_configs() -> dict[str, type[EngineConfig]]:
    """Returns the config class of every engine by the engine's name, without importing torch."""
    return discover(__name__, EngineConfig, "{name}.config")
