"""What methods may ask to know of a layer on real text: every statistic is found by being a module here."""

from __future__ import annotations

from moe.registry import discover
from moe.upcycle.statistics.base import Statistic

__all__ = ["Statistic", "statistic_classes"]


def statistic_classes() -> dict[str, type[Statistic]]:
    """Every statistic by its name."""
    return discover(__name__, Statistic)
