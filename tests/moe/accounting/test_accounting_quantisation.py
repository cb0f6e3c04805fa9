"""Bits from configs as they are published: what is quantised, what is spared, what is not known."""

from __future__ import annotations

from typing import Any

import pytest

from moe.accounting.bytes import BitWidths, uniform_bits, weight_bytes
from moe.accounting.quantisation import bits_from_config, dtype_bits, override_bits
from moe.accounting.shape import shape_from_config
from moe.errors import ConfigError
from tests.moe.accounting.published import GPT_OSS_20B, MODELS

LINEAR = ("attention", "dense", "shared", "expert")
GPT_OSS_SPARES = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


def quantised(method: str, **more: Any) -> dict[str, Any]:
    """A config with this quantisation."""
    return {"dtype": "bfloat16", "quantization_config": {"quant_method": method, **more}}


@pytest.mark.parametrize(
    ("config", "bits", "words"),
    [
        ({"torch_dtype": "float32"}, 32, "float32"),
        ({"dtype": "float16"}, 16, "float16"),
        ({"text_config": {"dtype": "float32"}}, 32, "float32"),
        ({"dense_config": {"dtype": "float32"}}, 32, "float32"),
        ({}, 16, "bfloat16, assumed: the config names no dtype"),
    ],
)
def test_plain_checkpoints(config: dict[str, Any], bits: float, words: str) -> None:
    assert bits_from_config(config) == (uniform_bits(bits), words)


@pytest.mark.parametrize(
    ("config", "low", "classes"),
    [
        (quantised("mxfp4", modules_to_not_convert=GPT_OSS_SPARES), 4.25, ("expert",)),
        # DeepSeek-V3: a scale of 32 bits for 128 x 128 elements
        (quantised("fp8", weight_block_size=[128, 128]), 8 + 32 / 16384, LINEAR),
        (quantised("fp8"), 8, LINEAR),
        # a scale of 16 bits and a zero point of 4 for 128 elements
        (quantised("gptq", bits=4, group_size=128), 4 + 20 / 128, LINEAR),
        (quantised("gptq", bits=8, group_size=-1), 8, LINEAR),
        (quantised("awq", w_bit=4, q_group_size=64), 4 + 20 / 64, LINEAR),
        (
            quantised("awq", bits=4, group_size=128, modules_to_not_convert=["self_attn", "mlp.gate"]),
            4 + 20 / 128,
            ("dense", "shared", "expert"),
        ),
        (
            quantised("fp8", modules_to_not_convert=["lm_head", "model.layers.0.mlp.gate", "shared_experts"]),
            8,
            ("attention", "dense", "expert"),
        ),
    ],
)
def test_only_some_classes_are_quantised(
    config: dict[str, Any], low: float, classes: tuple[str, ...]
) -> None:
    bits, words = bits_from_config(config)
    for name in LINEAR:
        assert getattr(bits, name) == (low if name in classes else 16)
    assert bits.expert_vector == bits.router == bits.vector == bits.embedding == bits.head == bits.kv == 16
    assert config["quantization_config"]["quant_method"] in words and "bfloat16" in words


def test_gpt_oss_as_published() -> None:
    # Biases of the experts, 3 * 2880 of each, stay at 16 bits.
    model = MODELS["gpt-oss-20b"]
    config = {**GPT_OSS_20B, **quantised("mxfp4", modules_to_not_convert=GPT_OSS_SPARES)}
    bits, _ = bits_from_config(config)
    experts = 24 * 32
    matrices = experts * (model.expert - 3 * 2880)
    expected = matrices * 0.53125 + (model.total - matrices) * 2
    assert weight_bytes(shape_from_config(config), bits) == expected


@pytest.mark.parametrize(
    ("config", "path"),
    [
        ({"dtype": "float7"}, "dtype"),
        ({"quantization_config": "gptq"}, "quantization_config"),
        ({"model_type": "llama", "text_config": "x"}, "model_type"),
        (quantised("fp8", weight_block_size=128), "model_type"),
        (quantised("bitsandbytes"), "quantization_config.quant_method"),
        (quantised("gptq", bits=4), "quantization_config"),
        (quantised("fp8", modules_to_not_convert=["model.layers.3.self_attn.q_proj"]), "quantization_config"),
        (quantised("fp8", modules_to_not_convert=["something"]), "quantization_config"),
    ],
)
def test_what_is_not_known_is_refused(config: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        bits_from_config(config)
    assert caught.value.mistakes[0].path.startswith(path)


def test_bits_given_by_hand() -> None:
    assert override_bits(BitWidths(), ["expert=4.25", "kv=8"]) == BitWidths(expert=4.25, kv=8)
    with pytest.raises(ConfigError) as caught:
        override_bits(BitWidths(), ["experts=4", "kv=", "kv=8", "head=-3"])
    assert [mistake.value for mistake in caught.value.mistakes] == ["experts=4", "kv=", "head=-3"]


def test_names_of_dtypes() -> None:
    assert [dtype_bits(name) for name in ("torch.bfloat16", "bf16", "fp8", "fp32", "int4")] == [
        16,
        16,
        8,
        32,
        4,
    ]
    assert dtype_bits("auto") is None and dtype_bits("float7") is None
