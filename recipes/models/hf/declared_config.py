"""A model's config as its class reads it: transformers keeps every key of config.json, known or not.

A Llama whose config.json has ``sliding_window`` attends to everything; a format that read the key would
compute something else.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from typing import Any


class DeclaredConfig:
    """View of a config that has only the keys that its class declares or its model reads."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        config = object.__getattribute__(self, "_config")
        if not _is_read(type(config), name):
            raise AttributeError(f"no model of {type(config).__name__} reads {name}")
        return getattr(config, name)


def _is_read(config_class: type, name: str) -> bool:
    if hasattr(config_class, name) or name in _declared(config_class):
        return True
    source = _model_source(config_class)
    # Qwen2 takes a head_dim that its config does not declare.
    return source is None or re.search(rf"\b{re.escape(name)}\b", source) is not None


@functools.cache
def _declared(config_class: type) -> frozenset[str]:
    """Returns the fields of a config class; older ones name them as arguments."""
    names = set(inspect.signature(config_class.__init__).parameters)
    for cls in config_class.__mro__:
        names |= set(vars(cls).get("__annotations__", {}))
    return frozenset(names | set(getattr(config_class, "attribute_map", {})))


@functools.cache
def _model_source(config_class: type) -> str | None:
    """Returns the source of the models of a config class; None where it is not of transformers."""
    module = config_class.__module__
    if not module.startswith("transformers.models."):
        return None
    try:
        return inspect.getsource(importlib.import_module(module.replace(".configuration_", ".modeling_")))
    except (ImportError, OSError):
        return None
