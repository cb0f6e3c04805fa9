"""Leaves out the waits for the disk: no test cuts the power, and a job waits some fifty times."""

from __future__ import annotations

import os


def install() -> None:
    """Makes `os.fsync` return at once, in this process and in what is forked from it."""
    os.fsync = _at_once


def _at_once(file: object) -> None:
    """Leaves what was written to the kernel, where every process sees it."""
