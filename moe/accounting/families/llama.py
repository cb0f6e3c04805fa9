"""Llama, Mistral and Mixtral; Llama 4 text models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moe.accounting.families.reading import (
    FFN,
    Family,
    LayerConfig,
    attention_bias,
    decoder_family,
    grouped_attention,
    kind_of_layer,
)
from moe.accounting.layers import DenseFFNShape, MoEShape
from moe.accounting.mixers import Mixer


def _llama(config: LayerConfig, index: int) -> tuple[Mixer, FFN]:
    bias = attention_bias(config)
    ffn = DenseFFNShape(config["intermediate_size"], bias=bool(config.get("mlp_bias", False)))
    return grouped_attention(config, bias=bias, output_bias=bias), ffn


def _mistral(config: LayerConfig, index: int) -> tuple[Mixer, FFN]:
    attention = grouped_attention(config, window=config.get("sliding_window"))
    return attention, DenseFFNShape(config["intermediate_size"])


def _mixtral(config: LayerConfig, index: int) -> tuple[Mixer, FFN]:
    experts = MoEShape(
        config["num_local_experts"], config["num_experts_per_tok"], config["intermediate_size"]
    )
    return grouped_attention(config, window=config.get("sliding_window")), experts


def _llama4(config: LayerConfig, index: int) -> tuple[Mixer, FFN]:
    """Reads a layer: experts at regular intervals, each with a shared one; dense layers have another width.

    The norm on queries and keys has no weights.
    """
    bias = attention_bias(config)
    attention = grouped_attention(config, bias=bias, output_bias=bias)
    attention = replace(attention, chunk=_chunk(config, index))
    every = config.get("interleave_moe_layer_step", 1)
    listed: Sequence[int] | None = config.get("moe_layers")
    sparse = (index + 1) % every == 0 if listed is None else index in listed
    if not sparse:
        return attention, DenseFFNShape(config["intermediate_size_mlp"])
    width = config["intermediate_size"]
    experts = config["num_local_experts"]
    return attention, MoEShape(experts, config["num_experts_per_tok"], width, shared_width=width)


def _chunk(config: LayerConfig, index: int) -> int | None:
    """Returns the chunk of a layer: only those with rotary positions attend within chunks."""
    kinds: Sequence[str] | None = config.get("layer_types")
    rotary: Sequence[int] | None = config.get("no_rope_layers")  # 1 for rotary positions
    if kinds is not None:
        known = ("chunked_attention", "full_attention")
        chunked = kind_of_layer(kinds, index, known) == "chunked_attention"
    elif rotary:
        chunked = bool(rotary[index])
    else:
        chunked = (index + 1) % config.get("no_rope_layer_interval", 4) != 0
    size = config.get("attention_chunk_size", 8192)
    return int(size) if chunked and size is not None else None


_LLAMA4_KEYS = ("intermediate_size", "intermediate_size_mlp", "num_local_experts", "num_experts_per_tok")
_LLAMA4 = decoder_family(_llama4, _LLAMA4_KEYS)

FAMILIES: dict[str, Family] = {
    "llama": decoder_family(_llama, kv_heads_stated=False),
    "mistral": decoder_family(_mistral),
    "mixtral": decoder_family(_mixtral, ("intermediate_size", "num_local_experts", "num_experts_per_tok")),
    "llama4_text": _LLAMA4,
    "llama4": replace(_LLAMA4, part=("text_config", "text tower")),
}
