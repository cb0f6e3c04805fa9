"""Costs of the arms of `upcycle_vs_cpt`: steps at equal tokens or FLOPs, and bytes and FLOPs of serving.

A training FLOP is counted by the ``exact`` convention of `moe.accounting.flops`: forward and backward, no
balance losses, validation or optimizer. D are the dense model's FLOPs a token, M those of the MoE model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe.accounting.bytes import step_bytes
from moe.accounting.distinct import estimated_distinct
from moe.accounting.layers import ModelShape
from moe.accounting.passes import decode_batch, pass_flops

WEIGHT_BITS = 16


def serving_costs(shape: ModelShape, batches: Sequence[int], length: int) -> list[dict[str, Any]]:
    """Computes bytes and FLOPs of decode steps, an entry for each batch size.

    All tensors and the cache take 16 bits an element. Without a trace the experts that a batch touches are
    the expected number under uniform routing, a bound from above (`moe.accounting.distinct`); for one
    sequence it is exact.

    Args:
        shape: Shape of the model.
        batches: Sequences at once.
        length: Tokens of every sequence, the new one included.
    """
    entries = []
    for size in batches:
        batch = decode_batch(size, length)
        distinct = estimated_distinct(shape, size)
        touched = step_bytes(shape, batch, distinct.per_layer)
        entries.append(
            {
                "batch": size,
                "length": length,
                "bytes_per_token": touched.complete / size,
                "weight_bytes_per_token": touched.weights / size,
                "flops_per_token": pass_flops(shape, batch) / size,
                "distinct_experts": distinct.mean,
                "distinct_source": distinct.source if shape.moe else None,
            }
        )
    return entries


def continued_steps(steps: int, dense_flops: float, moe_flops: float) -> int:
    """Returns the steps in which the dense model costs as much as the MoE model: about ``steps M/D``.

    Args:
        steps: Steps of the MoE model.
        dense_flops: FLOPs of training the dense model on a token.
        moe_flops: FLOPs of training the MoE model on a token.

    Returns:
        The number; never fewer than ``steps``, which the comparison at equal tokens needs.
    """
    return max(steps, round(steps * moe_flops / dense_flops))


def scratch_steps(steps: int, sunk_steps: int, dense_flops: float, moe_flops: float) -> int:
    """Returns the steps of a model from scratch with dense pre-training's FLOPs on top: ``steps + sunk D/M``.

    Args:
        steps: Steps of the upcycled model.
        sunk_steps: Steps of the dense model before it.
        dense_flops: FLOPs of training the dense model on a token.
        moe_flops: FLOPs of training the MoE model on a token.
    """
    return steps + round(sunk_steps * dense_flops / moe_flops)
