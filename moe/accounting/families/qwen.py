"""Qwen 2 and 3, dense and sparse."""

from __future__ import annotations

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
from moe.accounting.layers import DenseFFNShape, MoEShape
from moe.accounting.mixers import Mixer


def _qwen2(config: LayerConfig, index: int) -> tuple[Mixer, FFN]:
    attention = grouped_attention(config, window=_window(config, index), bias=True)
    return attention, DenseFFNShape(config["intermediate_size"])


def _qwen3(config: LayerConfig, index: int) -> tuple[Mixer, FFN]:
    bias = attention_bias(config)
    window = _window(config, index)
    attention = grouped_attention(
        config, window=window, head_dim=128, bias=bias, output_bias=bias, qk_norm="head"
    )
    return attention, DenseFFNShape(config["intermediate_size"])


def _window(config: LayerConfig, index: int) -> int | None:
    """Returns a layer's window: only with ``use_sliding_window``, from ``max_window_layers`` on."""
    if not config.get("use_sliding_window", False):
        return None
    return listed_window(config, index, index >= config.get("max_window_layers", 28))


def _sparse(config: LayerConfig, index: int) -> bool:
    """Returns True if a layer has experts: every n-th does, except those listed as dense."""
    step = config.get("decoder_sparse_step", 1)
    return index not in (config.get("mlp_only_layers") or ()) and (index + 1) % step == 0


def _qwen2_moe(config: LayerConfig, index: int) -> tuple[Mixer, FFN]:
    if config.get("use_sliding_window") and config.get("layer_types") is None:
        reject("layer_types", None, "the sliding layers are not given", "List the kind of every layer.")
    window = _window(config, index)
    attention = grouped_attention(config, window=window, bias=bool(config.get("qkv_bias", True)))
    if not _sparse(config, index):
        return attention, DenseFFNShape(config["intermediate_size"])
    experts = MoEShape(
        config["num_experts"],
        config["num_experts_per_tok"],
        config["moe_intermediate_size"],
        shared_width=config["shared_expert_intermediate_size"],
        shared_gate=True,
    )
    return attention, experts


def _qwen3_moe(config: LayerConfig, index: int) -> tuple[Mixer, FFN]:
    bias = attention_bias(config)
    window = config.get("sliding_window") if config.get("use_sliding_window", False) else None
    attention = grouped_attention(config, window=window, bias=bias, output_bias=bias, qk_norm="head")
    if not _sparse(config, index):
        return attention, DenseFFNShape(config["intermediate_size"])
    names = [key for key in ("num_experts", "num_local_experts") if config.get(key) is not None]
    counts = {int(config[key]) for key in names}
    if len(counts) != 1:
        reject("num_experts", sorted(counts), "the number of experts must be given once", "Correct it.")
    experts = MoEShape(counts.pop(), config["num_experts_per_tok"], config["moe_intermediate_size"])
    return attention, experts


_ROUTED = ("intermediate_size", "num_experts_per_tok", "moe_intermediate_size")

FAMILIES: dict[str, Family] = {
    "qwen2": decoder_family(_qwen2),
    "qwen3": decoder_family(_qwen3),
    "qwen2_moe": decoder_family(_qwen2_moe, (*_ROUTED, "num_experts", "shared_expert_intermediate_size")),
    "qwen3_moe": decoder_family(_qwen3_moe, _ROUTED),
}
