"""FLOPs and utilisation: by hand, and against torch's own counter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe.accounting.flops import (
    CONVENTIONS,
    COUNTED,
    flops_from_shape,
    forward_flops_per_token,
    mean_context,
    training_flops_per_token,
)
from moe.accounting.grouped_flops import grouped_formulas, grouped_product_flops
from moe.accounting.params import ParameterCount, count_from_shape, count_parameters
from moe.accounting.shape import (
    AttentionShape,
    LatentAttentionShape,
    MambaShape,
    attention_from_config,
    shape_from_config,
)
from moe.accounting.utilisation import mfu
from moe.errors import ConfigError
from tests.moe.accounting.family_cases import LATENT, SMALL, SMALL_CASES

COUNT = ParameterCount(total=1000, active=600, embedding=100, matmul=400)
LAYERS = (AttentionShape(num_heads=2, num_kv_heads=1, head_dim=5), AttentionShape(2, 1, 5, sliding_window=2))


def test_mean_context_by_hand() -> None:
    assert mean_context(1) == 1
    assert mean_context(4) == 2.5  # (1 + 2 + 3 + 4) / 4
    assert mean_context(4, window=2) == 1.75  # (1 + 2 + 2 + 2) / 4
    assert mean_context(4, window=4) == mean_context(4, window=9) == 2.5


def test_exact_by_hand() -> None:
    # 2*400 + 4*2*5*(2.5 + 1.75) = 800 + 170
    assert forward_flops_per_token(COUNT, LAYERS, 4, "exact") == 970
    assert training_flops_per_token(COUNT, LAYERS, 4) == 3 * 970


def test_palm_by_hand() -> None:
    # 6N + 12 L H Q T = 6*600 + 12*2*2*5*4 = 3600 + 960
    assert training_flops_per_token(COUNT, LAYERS, 4, "palm") == 4560


def test_torchtitan_by_hand() -> None:
    # 6*(600 - 60) + 12*2*5*(4 + 2): without the looked-up embedding, windows cut but nothing halved
    count = replace(COUNT, looked_up=60)
    assert training_flops_per_token(count, LAYERS, 4, "torchtitan") == 3240 + 720


def test_megatron_by_hand() -> None:
    # 6*(400 - 30) + 12*2*5*(2 + 2): without routers, half of all keys whatever the window
    count = replace(COUNT, router=30)
    assert training_flops_per_token(count, LAYERS, 4, "megatron") == 2220 + 480


def test_chunks_by_hand() -> None:
    chunked = AttentionShape(2, 1, 5, chunk=3)
    assert [chunked.keys_at(position) for position in range(1, 8)] == [1, 2, 3, 1, 2, 3, 1]
    assert chunked.mean_keys(7) == 13 / 7
    assert (chunked.most_keys(7), chunked.most_keys(2)) == (3, 2)


def test_latent_attention_by_hand() -> None:
    mixer = LatentAttentionShape(2, query_rank=3, kv_rank=4, nope_dim=5, rope_dim=6, value_dim=7)
    # scores of 2 heads: 11 channels of queries and 7 of values; the cache holds 4 + 6
    assert (mixer.score_width, mixer.cache_width) == (36, 10)
    # 3*(10 + 22) + 10*10 + 4*24 + 14*10
    assert mixer.matrix_parameters(10) == 96 + 100 + 96 + 140
    # 2 layers of 36 channels over (1 + 2 + 3) / 3 keys
    count = ParameterCount(total=0, active=0, embedding=0, matmul=0)
    assert forward_flops_per_token(count, (mixer, mixer), 3) == 2 * 2 * 36 * 2


def test_state_space_layers_by_hand() -> None:
    mixer = MambaShape(inner=6, state=2, conv=3, dt_rank=4)
    count = ParameterCount(total=0, active=0, embedding=0, matmul=0)
    # 7 FLOPs for each of 6*2 values of state, whatever the length; palm knows none
    assert forward_flops_per_token(count, (mixer,), 50) == 84
    assert forward_flops_per_token(count, (mixer,), 50, "palm") == 0
    assert (mixer.keys_at(9), mixer.cache_width, mixer.state_size) == (0, 0, 30)


def test_layers_for_further_tokens_count_for_megatron_alone() -> None:
    config = {**SMALL, **LATENT, "model_type": "deepseek_v3", "n_shared_experts": 1}
    plain = shape_from_config(config)
    further = shape_from_config({**config, "num_nextn_predict_layers": 2})
    for name in CONVENTIONS:
        extra = flops_from_shape(further, 8, name).forward - flops_from_shape(plain, 8, name).forward
        if name != "megatron":
            assert extra == 0
            continue
        # one layer, a matrix from twice the width to the width, and the head: each twice
        attention = plain.attention[0]
        layer = attention.matrix_parameters(24) + (3 + 1) * 3 * 24 * 14
        assert extra == 2 * (2 * (layer + 2 * 24 * 24 + 101 * 24) + 2 * attention.score_width * 4)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_the_tiny_qwen3_moe_of_the_page(implementation: str) -> None:
    # Attention 25,165,824, experts 100,663,296, router 524,288, head 16,777,216; nothing of the scores,
    # which the CPU's fused attention hides from the counter. Of grouped products it needs our formula.
    from transformers.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=256,
        vocab_size=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config._experts_implementation = implementation
    model = Qwen3MoeForCausalLM(config)
    tokens = torch.randint(3, 512, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=grouped_formulas()) as counter:
        model(tokens, use_cache=False)
    shape = shape_from_config(config.to_dict())
    if implementation == "grouped_mm":
        with torch.no_grad(), FlopCounterMode(display=False) as blind:
            model(tokens, use_cache=False)
        assert blind.get_total_flops() == 42_467_328, "without the formula the experts are lost"
    assert counter.get_total_flops() == 143_130_624
    assert 2 * count_from_shape(shape).matmul * tokens.numel() == 143_130_624


def test_grouped_products_by_hand() -> None:
    # 6 rows of width 4 through experts 4 -> 5: 2 * 6 * 4 * 5, however they fall into 3 groups
    rows, experts = torch.randn(6, 4, requires_grad=True), torch.randn(3, 4, 8, requires_grad=True)
    with FlopCounterMode(display=False, custom_mapping=grouped_formulas()) as counter:
        out = torch.nn.functional.grouped_mm(rows, experts, offs=torch.tensor([1, 1, 6], dtype=torch.int32))
    assert counter.get_total_flops() == 2 * 6 * 4 * 8 and out.shape == (6, 8)
    assert grouped_product_flops([6, 4], [3, 4, 5]) == 240
    assert grouped_product_flops([4, 6], [6, 5]) == 240  # the gradient of the weights: as many again
    assert grouped_product_flops([3, 2, 4], [3, 4, 5]) == 240
    assert grouped_product_flops([3, 2, 4], [4, 5]) == 80
    with pytest.raises(ValueError, match="no operands of a grouped product"):
        grouped_product_flops([6, 4], [3, 5, 4])


def test_a_training_step_of_grouped_products_is_three_forwards() -> None:
    rows, experts = torch.randn(8, 4, requires_grad=True), torch.randn(2, 4, 8, requires_grad=True)
    with FlopCounterMode(display=False, custom_mapping=grouped_formulas()) as counter:
        out = torch.nn.functional.grouped_mm(rows, experts, offs=torch.tensor([4, 8], dtype=torch.int32))
        (out * out.detach()).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 8 * 4 * 8


@pytest.mark.parametrize(
    "family", ["qwen2_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "phimoe", "flex_olmo"]
)
def test_linear_terms_of_families_against_the_counter_of_torch(family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    case = next(case for case in SMALL_CASES if case.family == family)
    config = AutoConfig.for_model(family, **case.change)
    config._attn_implementation = config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config)
    length = 8
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(3, 3 + length)[None], use_cache=False)
    shape = shape_from_config(config.to_dict())
    # Eager attention does the whole square.
    square = sum(2 * mixer.score_width * length * length for mixer in shape.attention)
    assert counter.get_total_flops() == 2 * count_from_shape(shape).matmul * length + square


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="seq_len=0"):
        forward_flops_per_token(COUNT, LAYERS, 0)
    with pytest.raises(ValueError, match="Choose one of exact, palm, torchtitan, megatron"):
        forward_flops_per_token(COUNT, LAYERS, 4, "chinchilla")  # type: ignore[arg-type]


@pytest.mark.parametrize("moe", [False, True])
def test_against_the_counter_of_torch(moe: bool) -> None:
    from transformers.models.llama import LlamaConfig, LlamaForCausalLM
    from transformers.models.mixtral import MixtralConfig, MixtralForCausalLM

    if moe:
        config = MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
        config._attn_implementation, config._experts_implementation = "eager", "eager"
        model: torch.nn.Module = MixtralForCausalLM(config)
    else:
        config = LlamaConfig(**SMALL, attention_bias=True)
        config._attn_implementation = "eager"
        model = LlamaForCausalLM(config)
    length = 8
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(3, 3 + length)[None], use_cache=False)
    # Eager attention does the whole square: every query meets `length` keys.
    heads, width, layers = 4, 6, 5
    square = layers * 4 * heads * width * length * length
    count = count_parameters(model)
    assert counter.get_total_flops() == 2 * count.matmul * length + square
    attention = attention_from_config(config.to_dict())
    causal = forward_flops_per_token(count, attention, length) * length
    # Half the square and half of its diagonal.
    assert causal == 2 * count.matmul * length + square * (length + 1) / (2 * length)


def test_attention_of_a_family_outside_the_table() -> None:
    config = {**SMALL, "model_type": "stablelm", "sliding_window": 3}
    assert attention_from_config(config) == (AttentionShape(4, 2, 6, sliding_window=3),) * 5
    for key, value in (("kv_lora_rank", 8), ("layer_types", ["linear_attention"])):
        with pytest.raises(ConfigError, match=key):
            attention_from_config({**config, key: value})
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        attention_from_config({"model_type": "stablelm"})


def test_every_convention_says_what_it_counts() -> None:
    assert COUNTED.keys() == set(CONVENTIONS) and all(COUNTED.values())


def test_mfu_by_hand() -> None:
    # 4 GFLOP a token at 100 tokens/s on 2 devices of 1 TFLOP/s: 4e11 / 2e12
    assert mfu(4e9, 100, 1e12, world_size=2) == pytest.approx(0.2)
    with pytest.warns(UserWarning, match="above 1: the peak is of another device"):
        assert mfu(4e9, 1000, 1e12) == pytest.approx(4.0)


@pytest.mark.parametrize("wrong", [(1, 1, 0, 1), (1, 1, 1, 0), (1, -1, 1, 1), (1, 1, float("nan"), 1)])
def test_mfu_refuses_what_is_no_rate(wrong: tuple[float, float, float, int]) -> None:
    with pytest.raises(ValueError, match="must"):
        mfu(*wrong)
