"""A FLOP formula for grouped products, which torch's counter does not know and takes for nothing.

Usage: ``FlopCounterMode(custom_mapping=grouped_formulas())``.

Letters: R rows of all experts, E experts, D and F widths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


def grouped_product_flops(left: Sequence[int], right: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """FLOPs of ``F.grouped_mm`` from the shapes of its operands; every row, whatever its group.

    ``[R, D] x [E, D, F]`` is one product of every row, ``[D, R] x [R, F]`` (gradients of the weights) sums
    over rows of every group, ``[E, R, D] x [E, D, F]`` is a product for every expert.

    Raises:
        ValueError: These are no shapes of a grouped product.
    """
    shapes = (len(left), len(right))
    if shapes not in ((2, 3), (3, 2), (2, 2), (3, 3)) or left[-1] != right[-2]:
        raise ValueError(f"left={list(left)} and right={list(right)} are no operands of a grouped product.")
    groups = left[0] if shapes == (3, 3) else 1
    return 2 * groups * left[-2] * left[-1] * right[-1]


def grouped_formulas() -> Mapping[Any, Callable[..., int]]:
    """What `torch.utils.flop_counter.FlopCounterMode` takes as ``custom_mapping``."""
    return {torch.ops.aten._grouped_mm: grouped_product_flops}
