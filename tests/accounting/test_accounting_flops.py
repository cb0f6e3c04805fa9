"""FLOPs and utilisation: by hand, and against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe.accounting.flops import forward_flops_per_token, mean_context, training_flops_per_token
from moe.accounting.params import ParameterCount, count_parameters
from moe.accounting.shape import AttentionShape, attention_from_config
from moe.accounting.utilisation import mfu
from moe.errors import ConfigError
from tests.accounting.test_accounting_params import SMALL

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


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="seq_len=0"):
        forward_flops_per_token(COUNT, LAYERS, 0)
    with pytest.raises(ValueError, match="Choose one of exact, palm"):
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


def test_mfu_by_hand() -> None:
    # 4 GFLOP a token at 100 tokens/s on 2 devices of 1 TFLOP/s: 4e11 / 2e12
    assert mfu(4e9, 100, 1e12, world_size=2) == pytest.approx(0.2)
    with pytest.warns(UserWarning, match="above 1: the peak is of another device"):
        assert mfu(4e9, 1000, 1e12) == pytest.approx(4.0)


@pytest.mark.parametrize("wrong", [(1, 1, 0, 1), (1, 1, 1, 0), (1, -1, 1, 1), (1, 1, float("nan"), 1)])
def test_mfu_refuses_what_is_no_rate(wrong: tuple[float, float, float, int]) -> None:
    with pytest.raises(ValueError, match="must"):
        mfu(*wrong)
