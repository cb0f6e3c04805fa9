"""Number of distinct experts that a batch uses, which determines the reads of a forward pass beside top-k.

It is taken from a trace if there is one; else it is an estimate, marked as an upper bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from moe.accounting.attention_experts import moe_blocks
from moe.accounting.layers import ModelShape
from moe.accounting.params import count_from_shape

Source = Literal["traced", "estimated-uniform-upper-bound"]


@dataclass(frozen=True)
class DistinctExperts:
    """Distinct routed experts that one forward pass uses in each MoE block, in order.

    Attributes:
        per_layer: One number per MoE block.
        source: ``traced``, or ``estimated-uniform-upper-bound``: the expectation under independent, uniform
            routing, which real routing does not exceed.
    """

    per_layer: tuple[float, ...]
    source: Source

    @property
    def mean(self) -> float | None:
        """Mean over the MoE blocks; None without any."""
        return sum(self.per_layer) / len(self.per_layer) if self.per_layer else None


def traced_distinct(tokens_LE: Sequence[Sequence[int]]) -> DistinctExperts:
    """Returns the distinct experts of a traced pass.

    Args:
        tokens_LE: Tokens that every expert of every MoE block computed, without dropped ones, summed over all
            ranks.
    """
    return DistinctExperts(tuple(sum(count > 0 for count in row) for row in tokens_LE), "traced")


def expected_distinct(num_experts: int, top_k: int, tokens: int) -> float:
    """Computes ``E (1 - (1 - K/E)^B)``, the expectation for independent tokens and uniform experts.

    For unequal shares p of the tokens, with sum K, ``sum 1 - (1 - p)^B`` is smaller: it is Schur-concave.

    Raises:
        ValueError: K is not in 1 to E, or there are fewer than 0 tokens.
    """
    if not 1 <= top_k <= num_experts or tokens < 0:
        raise ValueError(f"top_k={top_k} must be in 1 to {num_experts} and tokens={tokens} at least 0.")
    if tokens == 1:
        return float(top_k)  # avoids a rounding error
    return num_experts * (1 - (1 - top_k / num_experts) ** tokens)


def expected_distinct_of(shares: Iterable[float], tokens: int) -> float:
    """Computes ``sum 1 - (1 - p)^B``, the expectation for independent tokens and shares p of the experts."""
    return sum(1 - (1 - share) ** tokens for share in shares)


def estimated_distinct(shape: ModelShape, tokens: int) -> DistinctExperts:
    """Estimates the distinct experts without a trace, see `expected_distinct`; exact for one token."""
    layers = (expected_distinct(one.num_experts, one.top_k, tokens) for one in moe_blocks(shape))
    return DistinctExperts(tuple(layers), "estimated-uniform-upper-bound")


def all_distinct(shape: ModelShape) -> tuple[float, ...]:
    """Returns all experts of every MoE block, as MBU assumes for every pass."""
    return tuple(float(one.num_experts) for one in moe_blocks(shape))


def touched_share(shape: ModelShape, distinct: Sequence[float]) -> float:
    """Returns the share of all parameters, the embedding included, that a pass uses."""
    total = count_from_shape(shape).total
    width = shape.hidden_size
    idle = 0.0
    for one, used in zip(moe_blocks(shape), distinct, strict=True):
        expert = one.expert_matrix_parameters(width) + one.expert_vector_parameters(width)
        idle += (one.num_experts - used) * expert
    return (total - idle) / total
