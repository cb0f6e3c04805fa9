"""Scaling laws, their fits to runs, and their predictions for upcycling; this package touches no files.

Every module of this package is searched for laws. The arithmetic on few numbers uses numpy, scipy and torch
in fp64, on the CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe.registry import discover

if TYPE_CHECKING:
    from moe.scaling_laws.base import Law

__all__ = ["law_named", "laws"]


def laws() -> dict[str, Law]:
    """Returns every law by its name."""
    from moe.scaling_laws.base import Law

    return {name: law() for name, law in discover(__name__, Law).items()}


def law_named(name: str) -> Law:
    """Returns the law with a name.

    Raises:
        KeyError: No law has this name; the message lists the known ones.
    """
    known = laws()
    if name not in known:
        raise KeyError(f"no law is called {name!r}; there are: {', '.join(known)}")
    return known[name]
