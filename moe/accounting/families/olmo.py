"""OLMo 1 to 3, OLMoE and FlexOlmo."""

from __future__ import annotations

from dataclasses import replace

from moe.accounting.families.reading import (
    FFN,
    Family,
    LayerConfig,
    attention_bias,
    decoder_family,
    grouped_attention,
    listed_window,
)
from moe.accounting.layers import DenseFFNShape, MoEShape
from moe.accounting.mixers import AttentionShape, Mixer


def _normed_attention(config: LayerConfig) -> AttentionShape:
    bias = attention_bias(config)
    return grouped_attention(config, bias=bias, output_bias=bias, qk_norm="full")


def _olmo(config: LayerConfig, index: int) -> tuple[Mixer, FFN]:
    bias = attention_bias(config)
    attention = grouped_attention(config, bias=bias, output_bias=bias)
    return attention, DenseFFNShape(config["intermediate_size"])


def _olmo2(config: LayerConfig, index: int) -> tuple[Mixer, FFN]:
    return _normed_attention(config), DenseFFNShape(config["intermediate_size"])


def _olmo3(config: LayerConfig, index: int) -> tuple[Mixer, FFN]:
    window = listed_window(config, index, otherwise=(index + 1) % 4 != 0)
    attention = replace(_normed_attention(config), sliding_window=window)
    return attention, DenseFFNShape(config["intermediate_size"])


def _olmoe(config: LayerConfig, index: int) -> tuple[Mixer, FFN]:
    experts = MoEShape(config["num_experts"], config["num_experts_per_tok"], config["intermediate_size"])
    return _normed_attention(config), experts


_ROUTED = ("intermediate_size", "num_experts", "num_experts_per_tok")

FAMILIES: dict[str, Family] = {
    # norms without weights
    "olmo": decoder_family(_olmo, num_norms=0, kv_heads_stated=False),
    "olmo2": decoder_family(_olmo2, kv_heads_stated=False),
    "olmo3": decoder_family(_olmo3, kv_heads_stated=False),
    "olmoe": decoder_family(_olmoe, _ROUTED, kv_heads_stated=False),
    "flex_olmo": decoder_family(_olmoe, _ROUTED, kv_heads_stated=False),
}
