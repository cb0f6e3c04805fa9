"""Table of the options that were renamed. To be deleted at 1.0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from moe.errors import Mistake

T = TypeVar("T")

#: Old section to new section.
RENAMED = {"sparsify": "top_k_schedule", "versus": "upcycle_vs_cpt"}


def new_name(path: str) -> str:
    """Returns the present path of an option, e.g. ``upcycle_vs_cpt.arms`` for ``versus.arms``."""
    section, dot, rest = path.partition(".")
    return RENAMED.get(section, section) + dot + rest


def with_new_names(values: Mapping[str, T]) -> dict[str, T]:
    """Renames the keys of what an older version has written, section names or dotted paths."""
    return {new_name(path): value for path, value in values.items()}


def check_name(override: str) -> Mistake | None:
    """Returns the mistake of an override that uses an old name; None for the others."""
    path, _, value = override.lstrip("+~").partition("=")
    new = new_name(path)
    if new == path:
        return None
    return Mistake(path, value, f"the option is now called {new}", f"Write {override.replace(path, new, 1)}.")
