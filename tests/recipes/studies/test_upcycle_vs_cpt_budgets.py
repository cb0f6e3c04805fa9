"""Budgets and serving costs worked by hand."""

from __future__ import annotations

from typing import Any

import pytest

from moe.accounting.shape import shape_from_config
from recipes.jobs.arm_costs import continued_steps, scratch_steps, serving_costs

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": 16,
    "tie_word_embeddings": True,
}
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


def test_equal_flops() -> None:
    # 100 steps at 3 FLOPs are 150 at 2; 10 at 10 are 14.28 at 7, to the nearest.
    assert continued_steps(100, 2.0, 3.0) == 150
    assert continued_steps(10, 7.0, 10.0) == 14
    # A mixture that costs less still leaves the comparison at equal tokens.
    assert continued_steps(10, 3.0, 2.0) == 10


def test_the_dense_models_flops_on_top() -> None:
    # 60 dense steps at 2 FLOPs are 40 at 3.
    assert scratch_steps(100, 60, 2.0, 3.0) == 140
    assert scratch_steps(100, 0, 2.0, 3.0) == 100


def test_a_dense_decode_step_by_hand() -> None:
    (one,) = serving_costs(shape_from_config(LLAMA), [1], 10)
    # Four matrices of 4x4, three of 4x8, three norms of 4, the head of 16x4, one row of the embedding.
    weights = 64 + 96 + 12 + 64 + 4
    assert one["weight_bytes_per_token"] == 2 * weights
    # Keys and values of 4 channels: those of 10 tokens read, of one written.
    assert one["bytes_per_token"] == 2 * (weights + 80 + 8)
    # Products, then scores and values of 10 keys, then the head.
    assert one["flops_per_token"] == 2 * (64 + 96) + 2 * 8 * 10 + 2 * 64
    assert one["distinct_experts"] is None and one["distinct_source"] is None


def test_a_mixtures_decode_step_by_hand() -> None:
    one, two = serving_costs(shape_from_config(MIXTRAL), [1, 2], 10)
    assert (one["distinct_experts"], two["distinct_experts"]) == (2.0, 3.0)  # 4 (1 - (1/2)^2)
    assert two["distinct_source"] == "estimated-uniform-upper-bound"
    # Attention, three experts of 96, a router of 4x4, norms, head; two rows of the embedding.
    weights = 64 + 3 * 96 + 16 + 12 + 64 + 2 * 4
    assert two["weight_bytes_per_token"] == pytest.approx(2 * weights / 2)
    assert two["bytes_per_token"] == pytest.approx(2 * (weights + 2 * 88) / 2)
    # A token computes two experts and the router, whatever the batch.
    assert one["flops_per_token"] == two["flops_per_token"] == 2 * (64 + 2 * 96 + 16) + 160 + 128
