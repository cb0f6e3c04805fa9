"""Heads that are experts: worked by hand, and the dense attention where all of them are used."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe.accounting.attention_experts import AttentionExpertsShape, moe_blocks
from moe.accounting.bytes import BitWidths, full_step_bytes, step_bytes
from moe.accounting.distinct import estimated_distinct, touched_share
from moe.accounting.flops import CONVENTIONS, all_experts, flops_from_shape
from moe.accounting.layers import DenseFFNShape, LayerShape, ModelShape, MoEShape
from moe.accounting.memory import training_memory
from moe.accounting.mixers import AttentionShape
from moe.accounting.params import count_from_shape
from moe.accounting.passes import Batch, decode_batch, pass_flops, prefill_batch

# 8 query heads of width 3 over 4 of keys and values, all with biases, hidden size 10.
DENSE = AttentionShape(num_heads=8, num_kv_heads=4, head_dim=3, bias=True, output_bias=True, qk_norm="head")
D, ROUTER = 10, 40


def mixer(top_k: int, dense: AttentionShape = DENSE) -> AttentionExpertsShape:
    return AttentionExpertsShape(dense, top_k, ROUTER)


def model(attention: AttentionShape | AttentionExpertsShape) -> ModelShape:
    layers = (
        LayerShape(attention, DenseFFNShape(5)),
        LayerShape(attention, MoEShape(num_experts=6, top_k=2, width=5)),
    )
    return ModelShape(layers, hidden_size=D, vocab_size=20, tied_embeddings=False)


def test_parameters_by_hand() -> None:
    one = mixer(1)
    # A head with its two query heads: queries 6, keys 3, values 3, outputs 6 channels of 10.
    assert one.expert_matrix_parameters(D) == 18 * D
    assert one.expert_vector_parameters(D) == 12
    assert one.matrix_parameters(D) == ROUTER + 180
    # Two norms of 3, the output's bias of 10, and an expert's biases.
    assert one.vector_parameters(D) == 6 + 10 + 12
    assert one.bias_parameters(D) == 12 + 10
    assert one.idle_parameters(D) == 3 * (180 + 12)
    assert one.cache_width == 6 and one.score_width == 12


def test_keys_by_hand() -> None:
    one = mixer(1)
    # The query at position 9 sees itself and a quarter of 8.
    assert one.keys_at(9) == 3
    assert one.mean_keys(9) == sum(one.keys_at(position) for position in range(1, 10)) / 9
    # A decode step reads the one expert's share of the past; a prefill all that it writes.
    assert one.keys_read(9, 1) == 3 and one.keys_read(9, 9) == 9
    # Two new tokens touch 1 - (3/4)^2 of the experts between them.
    assert one.keys_read(10, 2) == 8 * 7 / 16 + 2


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_all_heads_are_the_dense_attention(convention: str) -> None:
    dense, routed = model(DENSE), model(mixer(4))
    routers = 2 * ROUTER
    assert count_from_shape(routed).active == count_from_shape(dense).active + routers
    more = {"exact": 2 * routers, "palm": 2 * routers, "torchtitan": 2 * routers, "megatron": 0}
    found = flops_from_shape(routed, 7, convention).forward  # type: ignore[arg-type]
    assert found == flops_from_shape(dense, 7, convention).forward + more[convention]  # type: ignore[arg-type]


def test_all_heads_read_what_the_dense_attention_reads() -> None:
    dense, routed = model(DENSE), model(mixer(4))
    for batch in (decode_batch(3, 9), prefill_batch(2, 9), Batch((9,), (4,))):
        one, other = full_step_bytes(dense, batch), full_step_bytes(routed, batch)
        assert other.complete == pytest.approx(one.complete + 2 * 2 * ROUTER)
        assert (other.kv_read, other.kv_written) == (one.kv_read, one.kv_written)


def test_windows_hold_within_an_expert() -> None:
    windowed = mixer(2, replace(DENSE, sliding_window=4))
    assert windowed.keys_at(100) == 1 + 3 / 2 and windowed.most_keys(100) == 4


def test_a_step_reads_the_heads_that_it_touches() -> None:
    shape = model(mixer(1))
    assert [one.num_experts for one in moe_blocks(shape)] == [6, 4, 4]
    batch, bits = decode_batch(1, 9), BitWidths()
    low, high = (step_bytes(shape, batch, (2, heads, 1), bits) for heads in (1, 3))
    assert high.attention - low.attention == 2 * 2 * (180 + 12)
    assert high.complete - low.complete == high.attention - low.attention
    with pytest.raises(ValueError, match="E="):
        step_bytes(shape, batch, (2,), bits)
    # One token touches K of each: what is active.
    share = touched_share(shape, estimated_distinct(shape, 1).per_layer)
    assert share == pytest.approx(count_from_shape(shape).active / count_from_shape(shape).total)


def test_as_if_every_token_used_all_heads() -> None:
    whole = all_experts(model(mixer(1)))
    assert [one.top_k for one in moe_blocks(whole)] == [6, 4, 4]
    assert pass_flops(model(mixer(1)), prefill_batch(1, 9)) < pass_flops(whole, prefill_batch(1, 9))


def test_memory_of_training_grows_with_the_heads_used() -> None:
    one, two = (training_memory(model(mixer(top_k)), 8) for top_k in (1, 2))
    assert one.weights == two.weights and one.activations < two.activations
