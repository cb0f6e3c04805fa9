"""Bytes of a forward pass and FLOPs of a batch, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe.accounting.bytes import (
    BitWidths,
    StepBytes,
    cache_bytes,
    full_step_bytes,
    kv_bytes_per_token,
    step_bytes,
    uniform_bits,
    weight_bytes,
)
from moe.accounting.flops import all_experts, forward_flops_per_token
from moe.accounting.layers import DenseFFNShape, LayerShape, ModelShape, MoEShape
from moe.accounting.mixers import AttentionShape, LatentAttentionShape, MambaShape
from moe.accounting.params import count_from_shape
from moe.accounting.passes import Batch, decode_batch, pass_flops, prefill_batch
from moe.accounting.shape import shape_from_config
from tests.moe.accounting.family_cases import SMALL_CASES, Case

# Width 4. Attention: 2*4*3*(2+1) = 72 in matrices, biases 3*(2+2) = 12, norms of heads 2*3 = 6; it keeps
# 2*3 = 6 elements a token.
ATTENTION = AttentionShape(2, 1, 3, bias=True, qk_norm="head", sliding_window=5)
# One expert 3*4*5 = 60; shared 3*4*7 = 84; router 4*6 = 24, its bias 6, gate of the shared expert 4.
MIXTURE = MoEShape(6, 2, 5, shared_width=7, shared_gate=True, router_vector=6)
# A dense network of 2*4*8 = 64 with biases 8 + 4 = 12.
DENSE = DenseFFNShape(8, gated=False, bias=True)
LAYERS = (LayerShape(ATTENTION, MIXTURE), LayerShape(replace(ATTENTION, sliding_window=None), DENSE))
# Embedding and head 10*4 = 40 each. Norms 2*2*4 + 4 = 20.
SHAPE = ModelShape(LAYERS, hidden_size=4, vocab_size=10, tied_embeddings=False)
# One bit a class, so that a byte stands for 8 elements: each class shows.
ONE = uniform_bits(8)


def test_every_part_of_a_step_by_hand() -> None:
    # Two sequences, 3 and 9 long: the window of 5 cuts the second in one layer: (3 + 5 + 3 + 9) keys of 6.
    step = step_bytes(SHAPE, Batch((3, 9)), [3.5], ONE)
    assert step == StepBytes(
        attention=2 * (72 + 12),
        dense=64 + 12,
        shared=84,
        experts=3.5 * 60,
        router=24 + 4 + 6,
        norms=2 * 6 + 20,
        head=40,
        embedding=2 * 4,
        kv_read=20 * 6,
        kv_written=4 * 6,
    )
    assert step.strict == 168 + 76 + 84 + 210 + 120
    assert step.weights == 168 + 76 + 84 + 210 + 34 + 32 + 40 + 8
    assert step.complete == step.weights + 120 + 24


@pytest.mark.parametrize(
    ("bits", "changed"),
    [
        (BitWidths(attention=8), {"attention": 2 * 72 * 1 + 2 * 12 * 2}),
        (BitWidths(dense=8), {"dense": 64 + 12 * 2}),
        (BitWidths(shared=8), {"shared": 84}),
        (BitWidths(expert=4.25), {"experts": 2 * 60 * 0.53125}),
        (BitWidths(router=32), {"router": 28 * 4 + 6 * 2}),
        (BitWidths(vector=32), {"norms": 128, "attention": 336 + 48, "dense": 152 + 24, "router": 68 + 12}),
        (BitWidths(head=8), {"head": 40}),
        (BitWidths(embedding=8), {"embedding": 4}),
        (BitWidths(kv=8), {"kv_read": 12, "kv_written": 12}),
        (BitWidths(), {}),
    ],
)
def test_each_class_has_its_own_bits(bits: BitWidths, changed: dict[str, float]) -> None:
    plain = step_bytes(SHAPE, Batch((1,)), [2])
    assert step_bytes(SHAPE, Batch((1,)), [2], bits) == replace(plain, **changed)


def test_biases_of_experts_may_be_wider_than_their_matrices() -> None:
    layer = LayerShape(ATTENTION, replace(MIXTURE, bias=True))  # 2*5 + 4 = 14 elements an expert
    shape = replace(SHAPE, layers=(layer,))
    alike = step_bytes(shape, Batch((1,)), [1], BitWidths(expert=4))
    wider = step_bytes(shape, Batch((1,)), [1], BitWidths(expert=4, expert_vector=16))
    assert (alike.experts, wider.experts) == ((60 + 14) / 2, 60 / 2 + 14 * 2)


def test_the_shared_expert_is_read_once_whatever_the_batch() -> None:
    few, many = (step_bytes(SHAPE, decode_batch(batch, 1), [6]) for batch in (1, 64))
    assert few.shared == many.shared and few.dense == many.dense and few.head == many.head


def test_all_experts_are_what_mbu_counts() -> None:
    # Independently: everything but the input embedding, of which two rows are read.
    batch = Batch((3, 9))
    whole = full_step_bytes(SHAPE, batch)
    assert whole.weights == 2 * (count_from_shape(SHAPE).total - 40 + 2 * 4)
    assert step_bytes(SHAPE, batch, [6]) == whole


def test_a_dense_model_is_one_expert_that_is_always_used() -> None:
    one = MoEShape(1, 1, 8, router_matrix=0)
    as_expert = replace(SHAPE, layers=(LayerShape(ATTENTION, one),))
    as_dense = replace(SHAPE, layers=(LayerShape(ATTENTION, DenseFFNShape(8)),))
    for batch in (Batch((4,)), Batch((3, 9)), prefill_batch(2, 7)):
        expert = step_bytes(as_expert, batch, [1])
        dense = step_bytes(as_dense, batch, [])
        assert expert.complete == dense.complete == full_step_bytes(as_dense, batch).complete
        assert expert.strict == dense.strict
        assert pass_flops(as_expert, batch) == pass_flops(as_dense, batch)
        assert pass_flops(all_experts(as_dense), batch) == pass_flops(as_dense, batch)


@pytest.mark.parametrize("distinct", [[], [2, 2], [-1], [7]])
def test_a_number_for_every_mixture_is_needed(distinct: list[float]) -> None:
    with pytest.raises(ValueError, match="must hold a number from 0 to E for MoE blocks of E="):
        step_bytes(SHAPE, Batch((1,)), distinct)


def test_a_prefill_reads_what_its_tokens_see_once() -> None:
    # A chunk of 3 tokens up to position 9 sees 9 keys, in the layer with the window of 5 the last 7.
    step = step_bytes(SHAPE, Batch((9,), (3,)), [6], ONE)
    assert (step.kv_read, step.kv_written) == ((9 + 7) * 6, 2 * 3 * 6)
    assert step.embedding == 3 * 4


def test_cache_of_each_kind() -> None:
    latent = LatentAttentionShape(4, None, kv_rank=10, nope_dim=6, rope_dim=2, value_dim=6)
    chunked = AttentionShape(2, 1, 3, chunk=4)
    state = MambaShape(inner=6, state=2, conv=3, dt_rank=4)
    layers = tuple(LayerShape(mixer, DENSE) for mixer in (ATTENTION, latent, chunked, state))
    shape = replace(SHAPE, layers=layers)
    # 6 + 12 + 6 + 0 elements a token
    assert kv_bytes_per_token(shape, 8) == 24
    assert kv_bytes_per_token(shape) == 48
    # of 9 tokens the window keeps 5, the chunk 4; the state is 6*(2+3) whatever the length
    assert cache_bytes(shape, (9,), ONE) == 5 * 6 + 9 * 12 + 4 * 6 + 30
    step = step_bytes(shape, Batch((9, 9)), [], ONE)
    assert step.kv_read == 2 * (5 * 6 + 9 * 12 + 1 * 6)  # position 9 is the first of its chunk
    assert step.state == 2 * 2 * 30


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_bytes_are_those_of_the_parameters_counted(case: Case) -> None:
    from transformers import AutoConfig

    shape = shape_from_config(AutoConfig.for_model(case.family, **case.change).to_dict())
    count = count_from_shape(shape)
    assert weight_bytes(shape) == 2 * count.total
    step = step_bytes(shape, decode_batch(1, 1), [ffn.top_k for ffn in shape.moe])
    assert step.weights - step.embedding == 2 * count.active_without_input_embedding


def test_flops_of_a_batch_by_hand() -> None:
    # Matrices: attention 2*72, router 24, gate 4, shared 84, experts 2*60, dense 64: 440. Head 40.
    # Keys of 12 channels: 3 and 5 with the window, 3 and 9 without: 20.
    batch = Batch((3, 9))
    assert pass_flops(SHAPE, batch) == 2 * (2 * 440 + 2 * 40) + 2 * 12 * 20
    assert pass_flops(SHAPE, batch, strict=True) == 2 * 2 * (440 - 4) + 2 * 12 * 20
    # as if every token used all 6 experts: 4 more of 60
    assert pass_flops(all_experts(SHAPE), batch) - pass_flops(SHAPE, batch) == 2 * 2 * 4 * 60


def test_flops_of_a_prefill_are_the_exact_convention_but_for_the_head() -> None:
    count = count_from_shape(SHAPE)
    exact = 2 * 7 * forward_flops_per_token(count, SHAPE.attention, 7, "exact")
    assert pass_flops(SHAPE, prefill_batch(2, 7)) == pytest.approx(exact - 2 * 2 * 6 * 40)


def test_flops_a_token_do_not_grow_with_the_batch() -> None:
    one, many = (pass_flops(SHAPE, decode_batch(batch, 20)) / batch for batch in (1, 64))
    assert one == many


@pytest.mark.parametrize(("lengths", "new"), [((), None), ((0,), None), ((3,), (4,)), ((3, 3), (1,))])
def test_impossible_batches_are_refused(lengths: tuple[int, ...], new: tuple[int, ...] | None) -> None:
    with pytest.raises(ValueError, match="must hold one sequence or more"):
        Batch(lengths, new)
