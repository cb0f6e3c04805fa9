"""Rules of attention experts that options and ``config.json`` tell; it imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe.attention.attention_config import AttentionConfig
from moe.errors import Mistake

#: Families whose attention is projections, an optional norm of each head, rotary embedding and softmax.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def key_value_heads(dense: Mapping[str, Any]) -> int:
    """Returns the number of key-value heads that a ``config.json`` says; 0 for none."""
    return dense.get("num_key_value_heads") or dense.get("num_attention_heads") or 0


def option_mistakes(config: AttentionConfig, dense: Mapping[str, Any]) -> list[Mistake]:
    """Checks family, heads and layers.

    Args:
        config: The requested attention experts.
        dense: The content of ``config.json``.
    """
    family, heads = dense.get("model_type"), key_value_heads(dense)
    if family not in FAMILIES:
        rule = f"attention experts are known for {', '.join(FAMILIES)}, and this model is {family!r}"
        return [Mistake("attention", config.name, rule, "Set attention=none, or take such a model.")]
    if heads < 2:
        rule = f"the model has {heads} key-value head, and experts are key-value heads"
        return [Mistake("attention", config.name, rule, "Set attention=none.")]
    return config.check(heads, int(dense["num_hidden_layers"]))
