"""Division of blocks into stages: contiguous parts whose largest cost is minimal."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from moe.planning.blocks import Blocks, Model

# Halvings of the interval that contains the largest cost of a part.
_HALVINGS = 16


def cut_evenly(costs: Sequence[float], parts: int) -> list[range]:
    """Cuts a sequence into contiguous, non-empty parts with a minimal largest cost.

    Args:
        costs: Costs of the items, none negative.
        parts: Number of parts, at most the number of items.

    Returns:
        The items of each part, in order.
    """
    assert 1 <= parts <= len(costs), (parts, len(costs))
    if parts == 1:
        return [range(len(costs))]
    # The upper limit exceeds the sum however it is rounded.
    # Filled from the end: the remainder relieves the first parts, which keep the most micro-batches.
    sums = [0.0, *accumulate(reversed(costs))]
    low, high = max(costs), sums[-1] * (1 + 1e-9)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if len(_greedy(sums, middle)) <= parts:
            high = middle
        else:
            low = middle
    count = len(costs)
    cut = [range(count - part.stop, count - part.start) for part in reversed(_greedy(sums, high))]
    return _split_to(cut, parts)


def _greedy(sums: Sequence[float], limit: float) -> list[range]:
    """Returns parts as long as the limit allows; ``sums`` are those of the first 0, 1, ... items."""
    found: list[range] = []
    start, items = 0, len(sums) - 1
    while start < items:
        # at least one item, so that rounding cannot leave a part without any
        stop = max(start + 1, bisect_right(sums, sums[start] + limit, start, items + 1) - 1)
        found.append(range(start, stop))
        start = stop
    return found


def _split_to(cut: list[range], parts: int) -> list[range]:
    """Splits the longest parts until there are enough; no part becomes more expensive."""
    while len(cut) < parts:
        at = max(range(len(cut)), key=lambda index: len(cut[index]))
        whole = cut[at]
        middle = (whole.start + whole.stop) // 2
        cut[at : at + 1] = [range(whole.start, middle), range(middle, whole.stop)]
    return cut


def stages_of(model: Model, costs: Sequence[float], pipeline: int, chunks: int) -> list[Blocks]:
    """Returns the blocks of every stage: part p of ``pipeline * chunks`` belongs to stage ``p mod pipeline``.

    Args:
        model: The model's blocks in order.
        costs: Cost of each kind of block.
        pipeline: Stages.
        chunks: Parts of a stage.
    """
    parts = cut_evenly([costs[kind] for kind in model.order], pipeline * chunks)
    return [model.part(item for part in parts[stage::pipeline] for item in part) for stage in range(pipeline)]
