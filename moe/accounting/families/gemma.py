"""Gemma 1 to 3, text."""

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
from moe.accounting.layers import DenseFFNShape
from moe.accounting.mixers import Mixer

# Defaults of Gemma3TextConfig, which the text part of a published config leaves out.
_GEMMA3_DEFAULTS = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "sliding_window": 4096,
}


def _gemma(config: LayerConfig, index: int) -> tuple[Mixer, FFN]:
    bias = attention_bias(config)
    attention = grouped_attention(config, head_dim=256, bias=bias, output_bias=bias)
    return attention, DenseFFNShape(config["intermediate_size"])


def _gemma2(config: LayerConfig, index: int) -> tuple[Mixer, FFN]:
    bias = attention_bias(config)
    window = listed_window(config, index, otherwise=index % 2 == 0)
    attention = grouped_attention(config, window=window, head_dim=256, bias=bias, output_bias=bias)
    return attention, DenseFFNShape(config["intermediate_size"])


def _gemma3(config: LayerConfig, index: int) -> tuple[Mixer, FFN]:
    bias = attention_bias(config)
    # published configs and transformers 5 name it differently
    pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    window = listed_window(config, index, (index + 1) % pattern != 0)
    attention = grouped_attention(
        config, window=window, head_dim=256, bias=bias, output_bias=bias, qk_norm="head"
    )
    return attention, DenseFFNShape(config["intermediate_size"])


_GEMMA3 = decoder_family(_gemma3, num_norms=4, tied=True)

FAMILIES: dict[str, Family] = {
    "gemma": decoder_family(_gemma, tied=True),
    "gemma2": decoder_family(_gemma2, num_norms=4, tied=True),
    "gemma3_text": _GEMMA3,
    "gemma3": replace(_GEMMA3, part=("text_config", "text tower"), defaults=_GEMMA3_DEFAULTS),
}
