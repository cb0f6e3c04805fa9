"""How the suite is spread over worker processes: what shares costly fixtures stays on one worker.

A group is a file, or a folder whose tests look at the same runs. Groups start in the order of their length,
by far the longest first, so that no worker is left alone with one at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

# Folders whose tests share runs of the whole job or started ranks; the longest first.
_TOGETHER = ("jobs", "engines", "chaos", "guards", "online", "convert", "cap", "versus", "calibration")


def group_of(path: Path, tests: Path) -> str:
    """The group of a test file below the folder ``tests``."""
    parts = path.relative_to(tests).parts
    return parts[0] if parts[0] in _TOGETHER else "/".join(parts)


def arrange(items: Sequence[pytest.Item], tests: Path) -> list[pytest.Item]:
    """The tests in the order in which groups are to start, each marked with its group."""

    def place(item: pytest.Item) -> int:
        group = group_of(item.path, tests)
        return _TOGETHER.index(group) if group in _TOGETHER else len(_TOGETHER)

    for item in items:
        item.add_marker(pytest.mark.xdist_group(group_of(item.path, tests)))
    return sorted(items, key=place)
