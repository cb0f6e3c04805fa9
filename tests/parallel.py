"""Order in which files of tests are given to worker processes: those that take longest first.

A file stays on one worker, so that what its tests share is made once.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

# Folders whose files start ranks or whole jobs; all others follow.
_FIRST = ("engines", "jobs", "sharded", "runtime", "kernels", "upcycling", "cap", "studies")


def arrange(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Returns the tests in the order in which files are to start; within a file as they stand."""

    def place(item: pytest.Item) -> int:
        folder = item.path.parent.name
        return _FIRST.index(folder) if folder in _FIRST else len(_FIRST)

    return sorted(items, key=place)
