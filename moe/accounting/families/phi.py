"""Phi, Phi-3 and PhiMoE."""

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


def _phi(config: LayerConfig, index: int) -> tuple[Mixer, FFN]:
    attention = grouped_attention(config, bias=True, output_bias=True)
    if config.get("qk_layernorm", False):
        attention = replace(attention, qk_norm="head", qk_norm_bias=True)
    return attention, DenseFFNShape(config["intermediate_size"], gated=False, bias=True)


def _phi3(config: LayerConfig, index: int) -> tuple[Mixer, FFN]:
    attention = grouped_attention(config, window=config.get("sliding_window"))
    return attention, DenseFFNShape(config["intermediate_size"])


def _phimoe(config: LayerConfig, index: int) -> tuple[Mixer, FFN]:
    bias = attention_bias(config)
    attention = grouped_attention(config, window=config.get("sliding_window"), bias=bias, output_bias=bias)
    experts = MoEShape(
        config["num_local_experts"], config["num_experts_per_tok"], config["intermediate_size"]
    )
    return attention, experts


def _read_phi(config: LayerConfig) -> ModelShape:
    """Reads a model whose attention and network run in parallel after one norm; the head has a bias."""
    return replace(_PHI.read(config), head_bias=True)


def _read_phimoe(config: LayerConfig) -> ModelShape:
    return replace(_PHIMOE.read(config), head_bias=bool(config.get("lm_head_bias", False)))


_PHI = decoder_family(_phi, num_norms=1, norm_bias=True, kv_heads_stated=False)
_PHIMOE = decoder_family(
    _phimoe, ("intermediate_size", "num_local_experts", "num_experts_per_tok"), norm_bias=True
)

FAMILIES: dict[str, Family] = {
    "phi": replace(_PHI, read=_read_phi),
    "phi3": decoder_family(_phi3, kv_heads_stated=False),
    "phimoe": replace(_PHIMOE, read=_read_phimoe),
}
