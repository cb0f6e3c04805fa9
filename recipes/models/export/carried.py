"""Config values that the native formats carry over from the dense model, and their common restrictions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from recipes.models.export.spec import ModelSpec, MoESpec

#: Config keys with the same name and meaning in the Llama-like families and their MoE classes.
COMMON_KEYS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_dropout",
    "rope_parameters",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_BLOCK = re.compile(r"model\.layers\.(\d+)\.mlp")


def carried_values(config: Any, keys: Sequence[str] = COMMON_KEYS) -> dict[str, Any]:
    """Returns the values of a dense config that a native config takes over."""
    return {key: getattr(config, key) for key in keys if hasattr(config, key)}


def with_old_rope_keys(content: dict[str, Any]) -> dict[str, Any]:
    """Adds rope_theta and rope_scaling, since readers before transformers 5 ignore rope_parameters."""
    rope = content.get("rope_parameters") or {}
    if "rope_theta" in rope:
        content["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        content["rope_scaling"] = {key: rope[key] for key in rope if key != "rope_theta"}
    return content


def reason_unlike_llama(name: str, spec: ModelSpec) -> str | None:
    """Rejects experts that are not gated, have biases, differ between layers, or are not named as in Llama.

    Returns:
        The reason as a clause, or None.
    """
    first = spec.moe_blocks[0]
    for moe in spec.moe_blocks:
        if _BLOCK.fullmatch(moe.site) is None:
            return f"{name} has its experts in model.layers.N.mlp, and this model in {moe.site}"
        if not moe.expert.gated or moe.expert.up_bias or moe.expert.down_bias:
            return f"{name}'s experts are gated and without biases, and these are not in layer {moe.index}"
        if _kind(moe) != _kind(first):
            return f"{name} has one router and one size of experts, and layer {moe.index} differs"
    return None


def _kind(moe: MoESpec) -> tuple[object, ...]:
    return (moe.router.config, moe.num_experts, moe.expert, moe.shared_width)


def reason_not_softmax(name: str, spec: ModelSpec, *, must_sum_to_one: bool) -> str | None:
    """Rejects routers other than top-k of a softmax over all experts, or over the chosen ones.

    Returns:
        The reason as a clause, or None.
    """
    router = spec.moe_blocks[0].router
    if router.name != "topk":
        return f"{name} has a top-k router, not {router.name!r}"
    if router.config.score != "softmax":
        return f"{name}'s gates are a softmax, and this router's are a {router.config.score}"
    if must_sum_to_one and not router.weights_sum_to_one:
        return f"{name}'s gates are a softmax renormalised to sum to 1, and this router's are not"
    return None


def block_of(moe: MoESpec) -> str:
    """Returns the name of the layer's block, ``model.layers.N``."""
    return moe.site.removesuffix(".mlp")
