"""Leaves out what no test looks at: waits for the disk, and most collections of garbage."""

from __future__ import annotations

import gc
import os

# Each collection of all that lives walks over half a million objects, and a job leaves few cycles.
_THRESHOLDS = (20_000, 20, 50)


def install() -> None:
    """Makes `os.fsync` return at once and garbage wait, in this process and in what is forked from it.

    No test cuts the power, and a job syncs some fifty times.
    """
    os.fsync = _at_once
    gc.set_threshold(*_THRESHOLDS)


def _at_once(file: object) -> None:
    """Leaves what was written to the kernel, where every process sees it."""
