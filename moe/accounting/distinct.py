"""How many different experts a batch touches: what a forward pass reads depends on it, not on top-k alone.

From a trace where there is one. Else an estimate that is a bound from above, and says so.
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
    """Different routed experts of every mixture of experts, in order, that one forward pass touches.

    Attributes:
        per_layer: One number a mixture.
        source: ``traced``, or ``estimated-uniform-upper-bound``: expected under independent, uniform
            routing, which real routing stays below.
    """

    per_layer: tuple[float, ...]
    source: Source

    @property
    def mean(self) -> float | None:
        """Over the mixtures; None where there are none."""
        return sum(self.per_layer) / len(self.per_layer) if self.per_layer else None


def traced_distinct(tokens_LE: Sequence[Sequence[int]]) -> DistinctExperts:
    """Of a pass that was watched.

    Args:
        tokens_LE: Tokens that every expert of every mixture computed. Those that were dropped do not count;
            those of all ranks do, summed before.
    """
    return DistinctExperts(tuple(sum(count > 0 for count in row) for row in tokens_LE), "traced")


def expected_distinct(num_experts: int, top_k: int, tokens: int) -> float:
    """``E (1 - (1 - K/E)^B)``: expected under independent tokens that use every expert equally often.

    With unequal shares p of the tokens, that sum to K, ``sum 1 - (1 - p)^B`` is smaller: it is Schur-concave.

    Raises:
        ValueError: K is not in 1 to E, or there are fewer than 0 tokens.
    """
    if not 1 <= top_k <= num_experts or tokens < 0:
        raise ValueError(f"top_k={top_k} must be in 1 to {num_experts} and tokens={tokens} at least 0.")
    if tokens == 1:
        return float(top_k)  # without a rounding error
    return num_experts * (1 - (1 - top_k / num_experts) ** tokens)


def expected_distinct_of(shares: Iterable[float], tokens: int) -> float:
    """``sum 1 - (1 - p)^B``: expected when independent tokens use every expert by its own share p."""
    return sum(1 - (1 - share) ** tokens for share in shares)


def estimated_distinct(shape: ModelShape, tokens: int) -> DistinctExperts:
    """Without a trace: see `expected_distinct`. Exact for one token."""
    layers = (expected_distinct(one.num_experts, one.top_k, tokens) for one in moe_blocks(shape))
    return DistinctExperts(tuple(layers), "estimated-uniform-upper-bound")


def all_distinct(shape: ModelShape) -> tuple[float, ...]:
    """Every expert of every mixture: what MBU takes every pass for."""
    return tuple(float(one.num_experts) for one in moe_blocks(shape))


def touched_share(shape: ModelShape, distinct: Sequence[float]) -> float:
    """Share of all parameters that a pass uses, the embedding among them."""
    total = count_from_shape(shape).total
    width = shape.hidden_size
    idle = 0.0
    for one, used in zip(moe_blocks(shape), distinct, strict=True):
        expert = one.expert_matrix_parameters(width) + one.expert_vector_parameters(width)
        idle += (one.num_experts - used) * expert
    return (total - idle) / total
