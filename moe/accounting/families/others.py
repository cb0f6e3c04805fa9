"""gpt-oss, DBRX and Jamba."""

from __future__ import annotations

import math
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
from moe.accounting.layers import DenseFFNShape, LayerShape, ModelShape, MoEShape
from moe.accounting.mixers import AttentionShape, MambaShape, Mixer


def _gpt_oss(config: LayerConfig, index: int) -> tuple[Mixer, FFN]:
    """Reads a layer: every projection has a bias, every head a sink, every other layer a window."""
    window = listed_window(config, index, otherwise=index % 2 == 0)
    bias = attention_bias(config, otherwise=True)
    attention = grouped_attention(config, window=window, head_dim=64, bias=bias, output_bias=bias)
    experts = MoEShape(
        config["num_local_experts"],
        config["num_experts_per_tok"],
        config["intermediate_size"],
        bias=True,
        router_vector=config["num_local_experts"],
    )
    return replace(attention, sinks=True), experts


def _read_dbrx(config: LayerConfig) -> ModelShape:
    """Reads a model with its own names of keys; norms have no biases."""
    width, heads = config["d_model"], config["n_heads"]
    ffn = config["ffn_config"]
    attention = AttentionShape(heads, config["attn_config"]["kv_n_heads"], width // heads)
    experts = MoEShape(ffn["moe_num_experts"], ffn["moe_top_k"], ffn["ffn_hidden_size"])
    layers = (LayerShape(attention, experts),) * int(config["n_layers"])
    tied = bool(config.get("tie_word_embeddings", False))
    return ModelShape(layers, width, config["vocab_size"], tied)


def _jamba(config: LayerConfig, index: int) -> tuple[Mixer, FFN]:
    """Reads a layer: few attend, the others are state-space models; every other one has experts."""
    mixer: Mixer
    if index % config["attn_layer_period"] == config["attn_layer_offset"]:
        mixer = grouped_attention(config)
    else:
        mixer = _mamba(config)
    experts = config["num_experts"]
    if experts == 1 or index % config["expert_layer_period"] != config["expert_layer_offset"]:
        return mixer, DenseFFNShape(config["intermediate_size"])
    return mixer, MoEShape(experts, config["num_experts_per_tok"], config["intermediate_size"])


def _mamba(config: LayerConfig) -> MambaShape:
    rank = config["mamba_dt_rank"]
    return MambaShape(
        inner=config["mamba_expand"] * config["hidden_size"],
        state=config["mamba_d_state"],
        conv=config["mamba_d_conv"],
        dt_rank=math.ceil(config["hidden_size"] / 16) if rank == "auto" else rank,
        conv_bias=bool(config.get("mamba_conv_bias", True)),
        bias=bool(config.get("mamba_proj_bias", False)),
        inner_norms=True,
    )


_JAMBA_KEYS = (
    "intermediate_size",
    "num_experts",
    "num_experts_per_tok",
    "expert_layer_period",
    "expert_layer_offset",
    "attn_layer_period",
    "attn_layer_offset",
    "mamba_d_state",
    "mamba_d_conv",
    "mamba_expand",
    "mamba_dt_rank",
)
_DBRX_KEYS = (
    "d_model",
    "n_heads",
    "n_layers",
    "vocab_size",
    "attn_config.kv_n_heads",
    "ffn_config.ffn_hidden_size",
    "ffn_config.moe_num_experts",
    "ffn_config.moe_top_k",
)
_GPT_OSS_KEYS = ("intermediate_size", "num_local_experts", "num_experts_per_tok")

FAMILIES: dict[str, Family] = {
    "gpt_oss": decoder_family(_gpt_oss, _GPT_OSS_KEYS),
    "dbrx": Family(_read_dbrx, _DBRX_KEYS),
    "jamba": decoder_family(_jamba, _JAMBA_KEYS),
}
