"""Times callables interleaved in one process, so that other load on the machine hits all alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds of one callable, over its rounds.

    Attributes:
        median: Median.
        p10: Tenth percentile.
        p90: Ninetieth percentile.
        rounds: Number of rounds.
    """

    median: float
    p10: float
    p90: float
    rounds: int


def interleave(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    synchronise: Callable[[], object] = lambda: None,
    seed: int = 0,
    measure: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, list[float]]:
    """Runs every callable once a round, in random order.

    Args:
        runs: Callables by name.
        rounds: Timed rounds, after `warmup` untimed ones.
        warmup: Untimed rounds.
        synchronise: Waits for the device; does nothing by default, for a CPU.
        seed: Seed of the order.
        measure: Returns the seconds of one run; None uses the host's clock between calls of `synchronise`.

    Returns:
        Seconds of each round by name; entries of the same index were measured side by side.
    """
    order = random.Random(seed)
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        order.shuffle(names)
        for name in names:
            taken = _host_seconds(runs[name], synchronise) if measure is None else measure(runs[name])
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
    """Returns median and spread."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return Timing(
        statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)], len(ordered)
    )


def median_ratio(values: list[float], base: list[float]) -> Timing:
    """Returns ratios round by round, in which drift of the machine cancels."""
    return summarise([value / other for value, other in zip(values, base, strict=True)])
