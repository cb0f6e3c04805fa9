"""Jobs, found by being in a module of this package."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recipes.jobs.base import Job


def job_classes() -> dict[str, type[Job]]:
    """Every job class by its name."""
    from moe.registry import discover
    from recipes.jobs.base import Job

    return discover(__name__, Job)
