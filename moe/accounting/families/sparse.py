"""Mixtures with plain attention and names of their own: Granite, MiniMax-M2, Hunyuan and Ernie 4.5."""

from __future__ import annotations

from dataclasses import replace

from moe.accounting.families.reading import (
    FFN,
    Family,
    LayerConfig,
    attention_bias,
    decoder_family,
    grouped_attention,
)
from moe.accounting.layers import DenseFFNShape, ModelShape, MoEShape
from moe.accounting.mixers import Mixer


def _granite(config: LayerConfig, index: int) -> tuple[Mixer, FFN]:
    """Reads a layer; the shared expert of ``granitemoeshared`` has a width of its own, 0 for none."""
    bias = attention_bias(config)
    experts = MoEShape(
        config["num_local_experts"],
        config["num_experts_per_tok"],
        config["intermediate_size"],
        shared_width=config.get("shared_intermediate_size") or 0,
    )
    return grouped_attention(config, bias=bias, output_bias=bias), experts


def _minimax_m2(config: LayerConfig, index: int) -> tuple[Mixer, FFN]:
    """Reads a layer; queries and keys are normed over all heads. The balancing bias is a buffer."""
    experts = MoEShape(
        config["num_local_experts"], config["num_experts_per_tok"], config["intermediate_size"]
    )
    return grouped_attention(config, qk_norm="full"), experts


def _hunyuan(config: LayerConfig, index: int) -> tuple[Mixer, FFN]:
    """Reads a layer; the shared expert is as wide as a routed one."""
    bias, width = attention_bias(config), config["intermediate_size"]
    experts = MoEShape(config["num_experts"], config["moe_topk"], width, shared_width=width)
    return grouped_attention(config, bias=bias, output_bias=bias, qk_norm="head"), experts


def _ernie(config: LayerConfig, index: int) -> tuple[Mixer, FFN]:
    """Reads a layer: experts at an interval between the first and the last sparse layer."""
    bias = bool(config.get("use_bias", False))
    attention = grouped_attention(config, bias=bias, output_bias=bias)
    last = config.get("moe_layer_end_index", -1)
    last = config["num_hidden_layers"] - 1 if last == -1 else last
    between = config.get("moe_layer_start_index", 1) <= index <= last
    if not between or (index + 1) % config.get("moe_layer_interval", 1):
        return attention, DenseFFNShape(config["intermediate_size"], bias=bias)
    width, experts = config["moe_intermediate_size"], config["moe_num_experts"]
    moe = MoEShape(
        experts,
        config["moe_k"],
        width,
        shared_width=width * config.get("moe_num_shared_experts", 2),
        shared_bias=bias,
        router_vector=experts,
    )
    return attention, moe


def _with_head_bias(family: Family) -> Family:
    """Adds the bias that Ernie's head has together with its projections."""

    def read(config: LayerConfig) -> ModelShape:
        return replace(family.read(config), head_bias=bool(config.get("use_bias", False)))

    return replace(family, read=read)


_LOCAL = ("intermediate_size", "num_local_experts", "num_experts_per_tok")
_ERNIE_KEYS = ("intermediate_size", "moe_intermediate_size", "moe_num_experts", "moe_k")

FAMILIES: dict[str, Family] = {
    "granitemoe": decoder_family(_granite, _LOCAL),
    "granitemoeshared": decoder_family(_granite, _LOCAL),
    "minimax_m2": decoder_family(_minimax_m2, _LOCAL),
    "hunyuan_v1_moe": decoder_family(_hunyuan, ("intermediate_size", "num_experts", "moe_topk")),
    "ernie4_5_moe": _with_head_bias(decoder_family(_ernie, _ERNIE_KEYS, tied=True)),
}
