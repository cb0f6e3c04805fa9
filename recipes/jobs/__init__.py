"""Jobs: ``recipes/jobs/NAME_job.py`` holds the class, and is found by that name.

These modules import no torch, so that mistakes of options are told at once; what runs a job is beside them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recipes.jobs.base import Job


def job_classes() -> dict[str, type[Job]]:
    """Every job class by its name."""
    from moe.registry import discover
    from recipes.jobs.base import Job

    return discover(__name__, Job, ending="_job")
