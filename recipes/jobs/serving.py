"""What a decode step costs a token: bytes that are touched, and FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe.accounting.bytes import step_bytes
from moe.accounting.distinct import estimated_distinct
from moe.accounting.layers import ModelShape
from moe.accounting.passes import decode_batch, pass_flops

WEIGHT_BITS = 16


def serving_costs(shape: ModelShape, batches: Sequence[int], length: int) -> list[dict[str, Any]]:
    """Costs of decode steps, an entry a batch.

    All tensors and the cache take 16 bits an element. Without a trace the experts that a batch touches are
    the expected number under uniform routing, a bound from above (`moe.accounting.distinct`); for one
    sequence it is exact.

    Args:
        shape: Of the model.
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
