"""Statistics of a layer on real text that methods can ask for; every module here is searched for them."""

from __future__ import annotations

from moe.registry import discover
from moe.upcycle.statistics.base import Statistic

__all__ = ["Statistic", "statistic_classes"]


def statistic_classes() -> dict[str, type[Statistic]]:
    """Returns every statistic by its name."""
    return discover(__name__, Statistic)
