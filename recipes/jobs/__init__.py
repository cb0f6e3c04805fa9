"""Jobs, found by being in a module of this package."""

from __future__ import annotations

from moe.registry import discover
from recipes.jobs.base import Job, Session

__all__ = ["Job", "Session", "job_classes"]


def job_classes() -> dict[str, type[Job]]:
    """Every job class by its name."""
    return discover(__name__, Job)
