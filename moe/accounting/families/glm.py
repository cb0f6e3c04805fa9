"""GLM-4-MoE: DeepSeek-V3's mixture over grouped-query attention; what Graft writes under that router."""

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


def _glm4_moe(config: LayerConfig, index: int) -> tuple[Mixer, FFN]:
    """The first layers are dense. Several shared experts are one of their joint width."""
    attention = grouped_attention(
        config, bias=attention_bias(config), qk_norm="head" if config.get("use_qk_norm") else "none"
    )
    if index < config["first_k_dense_replace"]:
        return attention, DenseFFNShape(config["intermediate_size"])
    width = config["moe_intermediate_size"]
    experts = MoEShape(
        config["n_routed_experts"],
        config["num_experts_per_tok"],
        width,
        shared_width=width * config["n_shared_experts"],
    )
    return attention, experts


def _read(config: LayerConfig) -> ModelShape:
    """The balancing bias of the router is a buffer, not a parameter, and not counted."""
    return replace(_DECODER.read(config), next_token_layers=int(config.get("num_nextn_predict_layers") or 0))


_DECODER = decoder_family(
    _glm4_moe,
    (
        "intermediate_size",
        "moe_intermediate_size",
        "n_routed_experts",
        "n_shared_experts",
        "num_experts_per_tok",
        "first_k_dense_replace",
    ),
)

FAMILIES: dict[str, Family] = {"glm4_moe": replace(_DECODER, read=_read)}
