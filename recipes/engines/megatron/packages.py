"""Optional packages beside megatron-core."""

from __future__ import annotations

import importlib
from typing import Any


def find_optional(module: str, attribute: str) -> tuple[Any, str | None]:
    """Imports an attribute of a package that need not be installed.

    Args:
        module: Dotted name of a module of the package.
        attribute: Name of the attribute.

    Returns:
        The attribute and None; or None and the last line of Python's error.
    """
    try:
        return getattr(importlib.import_module(module), attribute), None
    # Extensions that do not fit torch or the driver fail in various ways.
    except (ImportError, OSError, RuntimeError, AssertionError, AttributeError) as error:
        lines = str(error).strip().splitlines()
        return None, lines[-1] if lines else type(error).__name__
