"""Finds truth values that were read as numbers, and numbers that were read as truth values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moe.errors import Mistake


def confused_kinds(given: Any, read: Any, path: str) -> Iterator[Mistake]:
    """Yields a mistake for every such value.

    Args:
        given: Values as they were composed.
        read: The config that was read from them.
        path: Config path of both.
    """
    if isinstance(given, Mapping):
        for name, value in given.items():
            inner = read.get(name) if isinstance(read, Mapping) else getattr(read, str(name), None)
            yield from confused_kinds(value, inner, f"{path}.{name}" if path else str(name))
    elif isinstance(given, list) and isinstance(read, list | tuple):
        for number, (value, inner) in enumerate(zip(given, read, strict=False)):
            yield from confused_kinds(value, inner, f"{path}.{number}")
    elif _is_number(given) and isinstance(read, bool):
        yield Mistake(path, given, "this must be true or false", "Correct the value.")
    elif isinstance(given, bool) and _is_number(read):
        yield Mistake(path, given, "this must be a number", "Correct the value.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
