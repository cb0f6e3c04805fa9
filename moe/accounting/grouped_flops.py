"""FLOP formula for grouped products, which torch's counter does not know and counts as 0.

Usage: ``FlopCounterMode(custom_mapping=grouped_formulas())``.

Letters: R rows of all experts, E experts, D and F widths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


def grouped_product_flops(left: Sequence[int], right: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Computes the FLOPs of ``F.grouped_mm`` from the shapes of its operands, for all rows.

    ``[R, D] x [E, D, F]`` is one product per row, ``[D, R] x [R, F]`` (gradients of the weights) sums over
    the rows of every group, ``[E, R, D] x [E, D, F]`` is one product per expert.

    Raises:
        ValueError: The shapes are not those of a grouped product.
    """
    shapes = (len(left), len(right))
    if shapes not in ((2, 3), (3, 2), (2, 2), (3, 3)) or left[-1] != right[-2]:
        raise ValueError(f"left={list(left)} and right={list(right)} are no operands of a grouped product.")
    groups = left[0] if shapes == (3, 3) else 1
    return 2 * groups * left[-2] * left[-1] * right[-1]


def grouped_formulas() -> Mapping[Any, Callable[..., int]]:
    """Returns the ``custom_mapping`` for `torch.utils.flop_counter.FlopCounterMode`."""
    return {torch.ops.aten._grouped_mm: grouped_product_flops}
