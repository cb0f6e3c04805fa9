"""Limits of waiting that a slower or busier machine does not reach."""

from __future__ import annotations

import os
import time

_SLOWNESS = "GRAFT_TEST_SLOWNESS"
# What the loop below takes on the machine that the limits are written for, at its best.
_REFERENCE_S = 0.025
# A limit ends a test that hangs, so it may come late; it must not come while a machine is merely busy.
_SLACK = 4.0


def slowness() -> float:
    """Returns how many times slower than the reference this machine is, at least 1.

    Measured once in a session.
    """
    if _SLOWNESS not in os.environ:
        os.environ[_SLOWNESS] = str(max(1.0, min(_measure() for _ in range(5)) / _REFERENCE_S))
    return float(os.environ[_SLOWNESS])


def load() -> float:
    """Returns how many processes want each core at the moment, at least 1."""
    return max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))


def patience(seconds: float) -> float:
    """Returns how long to wait for what takes less than ``seconds`` on an idle reference machine."""
    return _SLACK * seconds * slowness() * load()


def _measure() -> float:
    begun = time.perf_counter()
    counts: dict[int, int] = {}
    for number in range(200_000):
        counts[number & 255] = counts.get(number & 255, 0) + number
    return time.perf_counter() - begun
