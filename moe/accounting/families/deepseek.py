"""DeepSeek V2 and V3 (R1), with latent attention; GLM-4-MoE and dots.llm1, with grouped-query attention."""

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
    reject,
)
from moe.accounting.layers import DenseFFNShape, ModelShape, MoEShape
from moe.accounting.mixers import LatentAttentionShape, Mixer, QKNorm


def _latent(config: LayerConfig) -> LatentAttentionShape:
    return LatentAttentionShape(
        num_heads=config["num_attention_heads"],
        query_rank=config["q_lora_rank"],
        kv_rank=config["kv_lora_rank"],
        nope_dim=config["qk_nope_head_dim"],
        rope_dim=config["qk_rope_head_dim"],
        value_dim=config["v_head_dim"],
        bias=attention_bias(config),
    )


def _deepseek(config: LayerConfig, index: int) -> tuple[Mixer, FFN]:
    if config.get("moe_layer_freq", 1) != 1:
        reject("moe_layer_freq", config["moe_layer_freq"], "only experts in every layer are known", "Use 1.")
    return _latent(config), _ffn(config, index, bias=bool(config.get("mlp_bias", False)))


def _glm4_moe(config: LayerConfig, index: int) -> tuple[Mixer, FFN]:
    norm: QKNorm = "head" if config.get("use_qk_norm") else "none"
    return grouped_attention(config, bias=attention_bias(config), qk_norm=norm), _ffn(config, index)


def _dots1(config: LayerConfig, index: int) -> tuple[Mixer, FFN]:
    bias = attention_bias(config)
    slides = bool(config.get("sliding_window")) and index >= config.get("max_window_layers", 62)
    window = listed_window(config, index, otherwise=slides)
    attention = grouped_attention(config, window=window, bias=bias, output_bias=bias, qk_norm="head")
    return attention, _ffn(config, index)


def _ffn(config: LayerConfig, index: int, *, bias: bool = False) -> FFN:
    """Reads a network: the first ones are dense; several shared experts count as one of their joint width."""
    if index < config["first_k_dense_replace"]:
        return DenseFFNShape(config["intermediate_size"], bias=bias)
    width = config["moe_intermediate_size"]
    return MoEShape(
        config["n_routed_experts"],
        config["num_experts_per_tok"],
        width,
        shared_width=width * (config["n_shared_experts"] or 0),
        shared_bias=bias,
    )


def _with_next_tokens(family: Family) -> Family:
    """Adds the layers for further tokens. The router's balancing bias is a buffer and does not count."""

    def read(config: LayerConfig) -> ModelShape:
        layers = int(config.get("num_nextn_predict_layers") or 0)
        return replace(family.read(config), next_token_layers=layers)

    return replace(family, read=read)


_ROUTED = (
    "intermediate_size",
    "moe_intermediate_size",
    "n_routed_experts",
    "num_experts_per_tok",
    "first_k_dense_replace",
)
_LATENT = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_V2 = replace(
    decoder_family(_deepseek, _ROUTED + _LATENT, kv_heads_stated=False),
    states=("q_lora_rank", "n_shared_experts"),
)

FAMILIES: dict[str, Family] = {
    "deepseek_v2": _V2,
    "deepseek_v3": _with_next_tokens(_V2),
    "dots1": decoder_family(_dots1, (*_ROUTED, "n_shared_experts")),
    "glm4_moe": _with_next_tokens(decoder_family(_glm4_moe, (*_ROUTED, "n_shared_experts"))),
}
