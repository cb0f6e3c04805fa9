"""DeepSeek V2 and V3 (R1), with latent attention."""

from __future__ import annotations

from dataclasses import replace

from moe.accounting.families.reading import (
    FFN,
    Family,
    LayerConfig,
    attention_bias,
    decoder_family,
    refuse,
)
from moe.accounting.layers import DenseFFNShape, ModelShape, MoEShape
from moe.accounting.mixers import LatentAttentionShape, Mixer


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
    """The first layers are dense. Several shared experts are one of their joint width."""
    if config.get("moe_layer_freq", 1) != 1:
        refuse("moe_layer_freq", config["moe_layer_freq"], "only experts in every layer are known", "Use 1.")
    bias = bool(config.get("mlp_bias", False))
    if index < config["first_k_dense_replace"]:
        return _latent(config), DenseFFNShape(config["intermediate_size"], bias=bias)
    width = config["moe_intermediate_size"]
    experts = MoEShape(
        config["n_routed_experts"],
        config["num_experts_per_tok"],
        width,
        shared_width=width * (config["n_shared_experts"] or 0),
        shared_bias=bias,
    )
    return _latent(config), experts


def _read_v3(config: LayerConfig) -> ModelShape:
    """The balancing bias of the router is a buffer, not a parameter, and not counted."""
    return replace(_V2.read(config), next_token_layers=int(config.get("num_nextn_predict_layers") or 0))


_KEYS = (
    "intermediate_size",
    "moe_intermediate_size",
    "n_routed_experts",
    "num_experts_per_tok",
    "first_k_dense_replace",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
)
_V2 = replace(
    decoder_family(_deepseek, _KEYS, kv_heads_stated=False), states=("q_lora_rank", "n_shared_experts")
)

FAMILIES: dict[str, Family] = {"deepseek_v2": _V2, "deepseek_v3": replace(_V2, read=_read_v3)}
