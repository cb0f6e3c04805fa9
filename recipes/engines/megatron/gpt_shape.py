"""Shape of a dense decoder for Megatron's GPT model, the decoders it supports, and their pipeline stages.

Reads the content of a ``config.json``; imports neither transformers nor megatron-core.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe.errors import Mistake

# Two have experts already; outside their MoE layers they are as Mistral and Qwen3.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe")
_DEFAULT_THETA = 10000.0
_REMEDY = "Set engine=native."


@dataclass(frozen=True)
class GPTShape:
    """Shape of a decoder of one of the `FAMILIES`.

    Attributes:
        window: Number of positions that attention looks back; None for all.
        qkv_bias: Whether the projections into attention have biases; the output projection never has.
        qk_norm: Whether queries and keys are normalised, head by head.
    """

    layers: int
    width: int
    ffn_width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_positions: int
    theta: float
    eps: float
    tied: bool
    window: int | None
    qkv_bias: bool
    qk_norm: bool
    attention_dropout: float


def read_shape(config: Mapping[str, Any]) -> GPTShape:
    """Returns the shape of a decoder that `family_mistakes` accepts.

    Args:
        config: The content of its ``config.json``, or ``to_dict()`` of the live config.
    """
    family, heads = config["model_type"], config["num_attention_heads"]
    return GPTShape(
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        ffn_width=config["intermediate_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or (128 if family == "qwen3" else config["hidden_size"] // heads),
        vocabulary=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        theta=float(_rope(config).get("rope_theta") or config.get("rope_theta") or _DEFAULT_THETA),
        eps=config["rms_norm_eps"],
        tied=bool(config.get("tie_word_embeddings", False)),
        window=_window(config),
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "qwen3_moe"),
        attention_dropout=float(config.get("attention_dropout") or 0.0),
    )


def family_mistakes(config: Mapping[str, Any], value: Any, seq_len: int | None = None) -> list[Mistake]:
    """Returns the reasons why Megatron's GPT model cannot compute what a decoder computes.

    Args:
        config: The content of its ``config.json``.
        value: Value of the option ``dense``.
        seq_len: Tokens in a sample, if known.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        rule = f"the Megatron engine takes the families {', '.join(FAMILIES)}, not {family}"
        return [Mistake("dense", value, rule, _REMEDY)]
    rules = []
    rope = _rope(config)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default":
        rules.append(f"its rotary embeddings are of the kind {kind}, and the Megatron engine has the default")
    if config.get("attention_bias") or config.get("mlp_bias"):
        rules.append("it has biases (attention_bias or mlp_bias) that the Megatron engine has no place for")
    if config.get("hidden_act", "silu") != "silu":
        rules.append(f"its networks use {config['hidden_act']}, and the Megatron engine has silu")
    if (partial := rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        rules.append(f"it turns {partial:g} of each head alone, and the Megatron engine turns all of it")
    window = _window(config)
    if window is not None and seq_len is not None and seq_len > window:
        rules.append(f"it looks back {window} tokens, and the Megatron engine at all {seq_len} of a sample")
    return [Mistake("dense", value, rule, _REMEDY) for rule in rules]


def split_mistakes(config: Mapping[str, Any], tensor_parallel: int) -> list[Mistake]:
    """Returns the reasons why a decoder of the `FAMILIES` cannot be sharded by tensor parallelism."""
    shape = read_shape(config)
    parts = {
        "attention heads": shape.heads,
        "key-value heads": shape.kv_heads,
        "entries of the vocabulary": shape.vocabulary,
        "features of the feed-forward networks": shape.ffn_width,
    }
    return [
        Mistake(
            "engine.tensor_parallel",
            tensor_parallel,
            f"the dense model's {count} {what} do not divide over {tensor_parallel} ranks",
            "Set a common divisor, or 1.",
        )
        for what, count in parts.items()
        if count % tensor_parallel
    ]


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _window(config: Mapping[str, Any]) -> int | None:
    if config["model_type"].startswith("qwen") and not config.get("use_sliding_window"):
        return None
    window: int | None = config.get("sliding_window")
    return window


def blocks_of_stages(blocks: int, stages: int) -> list[range]:
    """Returns the consecutive blocks of each pipeline stage.

    If they do not divide evenly, the first stages have one more: the last has the head as well.
    """
    each, more = divmod(blocks, stages)
    ends = [(stage + 1) * each + min(stage + 1, more) for stage in range(stages)]
    return [range(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def megatron_layout(blocks: int, stages: int) -> list[list[str]] | None:
    """Returns the stages in Megatron's format; None for a single stage."""
    if stages == 1:
        return None
    layout = [["decoder"] * len(own) for own in blocks_of_stages(blocks, stages)]
    return [["embedding", *layout[0]], *layout[1:-1], [*layout[-1], "loss"]]


def stage_mistakes(config: Mapping[str, Any], stages: int) -> list[Mistake]:
    """Returns the reasons why a decoder of the `FAMILIES` cannot be split into pipeline stages.

    Args:
        config: The content of its ``config.json``.
        stages: Number of stages.
    """
    blocks = read_shape(config).layers
    if blocks >= stages:
        return []
    rule = f"the dense model's {blocks} blocks are fewer than {stages} stages"
    return [Mistake("engine.pipeline_parallel", stages, rule, f"Set {blocks} or less.")]
