"""Shape of a decoder, layer by layer, read from its config.

`shape_from_config` reads the mapping in a Hugging Face ``config.json``. It knows the families in
`moe.accounting.families` and rejects all others: a guessed shape would give wrong counts without a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moe.accounting.families import FAMILIES
from moe.accounting.families.reading import (
    DECODER_KEYS,
    LayerConfig,
    check_keys,
    grouped_attention,
    reads_config,
    reject,
)
from moe.accounting.layers import DenseFFNShape, LayerShape, ModelShape, MoEShape
from moe.accounting.mixers import AttentionShape, LatentAttentionShape, MambaShape, Mixer

__all__ = [
    "AttentionShape",
    "DenseFFNShape",
    "LatentAttentionShape",
    "LayerShape",
    "MambaShape",
    "Mixer",
    "MoEShape",
    "ModelShape",
    "attention_from_config",
    "known_families",
    "shape_from_config",
]

GRAFT = "graft_moe"
# Keys that indicate another kind of attention, for families outside the table.
_OTHER_KINDS = ("kv_lora_rank", "linear_num_key_heads", "mamba_d_state", "ssm_cfg", "attn_layer_period")


def known_families() -> tuple[str, ...]:
    """Returns the values of ``model_type`` that `shape_from_config` reads."""
    return tuple(sorted((*FAMILIES, GRAFT)))


@reads_config
def shape_from_config(config: LayerConfig) -> ModelShape:
    """Reads a model's shape from the mapping in a Hugging Face ``config.json``.

    Args:
        config: E.g. ``json.loads(path.read_text())`` or ``model.config.to_dict()``.

    Raises:
        ConfigError: The family is unknown, a key is missing, or the attention is not causal.
    """
    name = config.get("model_type")
    if name == GRAFT:
        return _graft_shape(config)
    if not isinstance(name, str) or name not in FAMILIES:
        reject(
            "model_type",
            name,
            "no accounting knows this family",
            f"Known are {', '.join(known_families())}. For another, count the module: "
            "moe.accounting.params, or tools.describe --from-module.",
        )
    family = FAMILIES[name]
    if family.part is None:
        _check_causal(config)
        check_keys(config, name, family.needs, family.states)
        return _checked(family.read(config))
    key, part = family.part
    inner = config.get(key)
    if not isinstance(inner, Mapping):
        reject(key, inner, f"the config of {name} needs this key", "Give the complete config.json.")
    inner = {**family.defaults, **inner}
    # the whole may state what its part leaves out
    if "tie_word_embeddings" in config:
        inner.setdefault("tie_word_embeddings", config["tie_word_embeddings"])
    _check_causal(inner)
    check_keys(inner, f"{name} in {key}", family.needs, family.states)
    return replace(_checked(family.read(inner)), part=part)


def _checked(shape: ModelShape) -> ModelShape:
    for ffn in shape.moe:
        if ffn.top_k > ffn.num_experts:
            rule = f"a token cannot use more experts than the {ffn.num_experts} there are"
            reject("num_experts_per_tok", ffn.top_k, rule, "Correct it.")
    return shape


def _check_causal(config: LayerConfig) -> None:
    if config.get("use_bidirectional_attention"):
        reject("use_bidirectional_attention", True, "attention must be causal", "Count a causal decoder.")


def _graft_shape(config: LayerConfig) -> ModelShape:
    # Imports routers only when an export of Graft is read.
    from moe.accounting.families.graft import with_moe_blocks

    dense = config.get("dense_config")
    if not isinstance(dense, Mapping):
        reject("dense_config", dense, f"the config of {GRAFT} needs this key", "Give the whole config.json.")
    return with_moe_blocks(config, shape_from_config(dense))


def attention_from_config(config: LayerConfig) -> tuple[Mixer, ...]:
    """Reads the attention of every layer, also for families outside the table if it is plain.

    Together with `moe.accounting.params.count_parameters` of a live module this gives the FLOPs of a model
    whose family is not in the table. All layers are then assumed equal, without biases.

    Raises:
        ConfigError: A key is missing, or the config names another kind of attention (latent, linear,
            state-space, or a window in only some layers).
    """
    if config.get("model_type") in (*FAMILIES, GRAFT):
        return shape_from_config(config).attention
    for key in _OTHER_KINDS:
        if config.get(key) is not None:
            reject(key, config[key], "no accounting knows this attention", "Add the family to the table.")
    kinds = set(config.get("layer_types") or ["full_attention"])
    if kinds != {"full_attention"}:
        reject(
            "layer_types", sorted(kinds), "only full attention is known here", "Add the family to the table."
        )
    check_keys(config, "this", DECODER_KEYS)
    one = grouped_attention(config, window=config.get("sliding_window"))
    return (one,) * int(config["num_hidden_layers"])
