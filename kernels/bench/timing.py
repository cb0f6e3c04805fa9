"""Times rivals in one process and run, interleaved: whatever else the machine does hits all alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds of one rival.

    Attributes:
        median: Over the rounds.
        p10: Tenth percentile.
        p90: Ninetieth percentile.
        rounds: How many there were.
    """

    median: float
    p10: float
    p90: float
    rounds: int


def interleave(
    rivals: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    synchronise: Callable[[], object] = lambda: None,
    seed: int = 0,
    measure: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, list[float]]:
    """Runs every rival once a round, in random order.

    Args:
        rivals: Name to what is timed.
        rounds: Timed rounds, after `warmup` rounds that are not.
        warmup: Untimed rounds.
        synchronise: Waits for the device; the identity on a CPU.
        seed: Of the order.
        measure: Seconds of one run; None: by the host's clock, between two calls of `synchronise`.

    Returns:
        Seconds of each round by name; entries of the same index were measured side by side.
    """
    order = random.Random(seed)
    names = list(rivals)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        order.shuffle(names)
        for name in names:
            taken = _host_seconds(rivals[name], synchronise) if measure is None else measure(rivals[name])
            if number >= warmup:
                seconds[name].append(taken)
    return seconds


def _host_seconds(run: Callable[[], object], synchronise: Callable[[], object]) -> float:
    synchronise()
    started = time.perf_counter()
    run()
    synchronise()
    return time.perf_counter() - started


def summarise(values: list[float]) -> Timing:
    """Median and spread."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return Timing(
        statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)], len(ordered)
    )


def median_ratio(values: list[float], base: list[float]) -> Timing:
    """Ratios round by round: drift of the machine cancels."""
    return summarise([value / other for value, other in zip(values, base, strict=True)])
