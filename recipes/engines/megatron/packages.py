"""What is optional beside megatron-core: whether it can be used here."""

from __future__ import annotations

import importlib
from typing import Any


def find_optional(module: str, attribute: str) -> tuple[Any, str | None]:
    """Something of a package that need not be installed, or why it cannot be had.

    Args:
        module: Dotted name.
        attribute: Of the module.

    Returns:
        It, and None; or None, and the last line of what Python says.
    """
    try:
        return getattr(importlib.import_module(module), attribute), None
    # Extensions that do not fit torch or the driver fail in as many ways as there are loaders.
    except (ImportError, OSError, RuntimeError, AssertionError, AttributeError) as error:
        lines = str(error).strip().splitlines()
        return None, lines[-1] if lines else type(error).__name__
