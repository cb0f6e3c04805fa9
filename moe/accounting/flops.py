"""FLOPs of a token under a named convention.

One multiplication with its addition is two FLOPs. What a number counts is decided by its convention, and
the same model at the same speed has another utilisation under another: always name it.

=================  ==============================  ==============================
                   ``exact``                       ``palm``
=================  ==============================  ==============================
linear layers      matrices a token meets,         all active parameters, norms,
                   router and head included        biases and embeddings included
embedding look-up  not counted                     counted as a matrix
attention          keys a query can see: causal    all keys of the sequence
                   and sliding windows respected
norms, softmax,    not counted                     not counted
rotary, top-k
recomputation      not counted                     not counted
=================  ==============================  ==============================

``palm`` is ``6N + 12 L H Q T`` for training (A. Chowdhery et al., "PaLM", arXiv:2204.02311, appendix B),
with N the active parameters, L layers, H heads, Q their width, T the sequence length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from moe.accounting.params import ParameterCount
from moe.accounting.shape import AttentionShape

Convention = Literal["exact", "palm"]

# Forward, gradient of the inputs, gradient of the weights: three products of the same size.
TRAINING_FORWARDS = 3


def forward_flops_per_token(
    count: ParameterCount,
    attention: Sequence[AttentionShape],
    seq_len: int,
    convention: Convention = "exact",
) -> float:
    """FLOPs of a token's forward pass, on average over the positions of a sequence.

    Args:
        count: From a live module or a shape.
        attention: Of every layer; see `moe.accounting.shape.attention_from_config`.
        seq_len: Tokens of a sequence. Documents packed into one count as one, as they do in the products.
        convention: See the module.

    Raises:
        ValueError: ``seq_len`` is below 1, or the convention is unknown.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len={seq_len} must be 1 or more.")
    if convention not in get_args(Convention):
        known = ", ".join(get_args(Convention))
        raise ValueError(f"convention={convention!r} is unknown. Choose one of {known}.")
    if convention == "palm":
        return 2 * count.active + sum(_attention_flops(layer, seq_len) for layer in attention)
    seen = (_attention_flops(layer, mean_context(seq_len, layer.sliding_window)) for layer in attention)
    return 2 * count.matmul + sum(seen)


def training_flops_per_token(
    count: ParameterCount,
    attention: Sequence[AttentionShape],
    seq_len: int,
    convention: Convention = "exact",
) -> float:
    """FLOPs of a token's forward and backward pass: three forward passes. See `forward_flops_per_token`."""
    return TRAINING_FORWARDS * forward_flops_per_token(count, attention, seq_len, convention)


def mean_context(seq_len: int, window: int | None = None) -> float:
    """Keys that a query sees under causal attention, itself included, on average over a sequence.

    The query at position t (from 1) sees ``min(t, window)``; without a window the mean is ``(S + 1) / 2``.
    """
    reach = seq_len if window is None else min(window, seq_len)
    # a triangle while the window fills, then a band
    return (reach * (reach + 1) / 2 + (seq_len - reach) * reach) / seq_len


def _attention_flops(layer: AttentionShape, context: float) -> float:
    """Scores and weighted values over ``context`` keys: two products of two FLOPs."""
    return 2 * 2 * layer.num_heads * layer.head_dim * context
