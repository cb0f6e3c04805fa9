"""Scaling laws, how they are fitted to runs, and what they say about upcycling. No files are touched here.

A law is found by being a class in a module of this package. Plain arithmetic on few numbers: numpy, scipy and
torch in fp64, on the CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe.registry import discover

if TYPE_CHECKING:
    from moe.scaling_laws.base import Law

__all__ = ["law_named", "laws"]


def laws() -> dict[str, Law]:
    """Every law by its name."""
    from moe.scaling_laws.base import Law

    return {name: law() for name, law in discover(__name__, Law).items()}


def law_named(name: str) -> Law:
    """The law of a name.

    Raises:
        KeyError: No law has this name; the message lists those there are.
    """
    known = laws()
    if name not in known:
        raise KeyError(f"no law is called {name!r}; there are: {', '.join(known)}")
    return known[name]
