"""Shapes of every family, held against the models that transformers builds from the same configs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from moe.accounting.families import FAMILIES
from moe.accounting.params import count_from_shape, count_parameters
from moe.accounting.shape import MambaShape, attention_from_config, known_families, shape_from_config
from moe.errors import ConfigError
from tests.grid import each
from tests.moe.accounting.family_cases import (
    DBRX_SMALL,
    DEFAULT_CASES,
    LATENT,
    MIXTRAL_EXPERTS,
    SMALL,
    SMALL_CASES,
    Case,
)

SIX_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 14, "head_dim": 8}
# Mixtures whose mixers no table knows.
UNTABLED: list[tuple[str, dict[str, Any]]] = [
    ("minimax", {"num_local_experts": 6, "num_experts_per_tok": 2}),
    ("qwen3_next", {**SIX_EXPERTS, "shared_expert_intermediate_size": 14}),
    (
        "lfm2_moe",
        {**SIX_EXPERTS, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"] * 2 + ["conv"]},
    ),
]


def build(case: Case) -> tuple[Mapping[str, Any], nn.Module]:
    """The content of its config.json, and the model, without memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(case.family, **case.change)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return config.to_dict(), model


def experts_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """E and K as the config's own keys say, whatever they are called; (1, 1) for a dense model."""
    ffn = config.get("ffn_config") or {}
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    experts = next((config[name] for name in names if config.get(name)), ffn.get("moe_num_experts", 1))
    used = ("num_experts_per_tok", "moe_topk", "moe_k")
    return experts, next((config[name] for name in used if config.get(name)), ffn.get("moe_top_k", 1))


@pytest.mark.parametrize("case", (*SMALL_CASES, *DEFAULT_CASES), ids=str)
def test_parameters_are_those_of_transformers(case: Case) -> None:
    config, model = build(case)
    sizes = {name: param.numel() for name, param in model.named_parameters()}  # tied once
    experts, top_k = experts_of(config)
    routed = {name: size for name, size in sizes.items() if re.search(r"\.experts\.", name)}
    blocks = {name.split(".experts.")[0] for name in routed}
    embedding = sum(size for name, size in sizes.items() if re.search(r"(embed_tokens|wte)\.weight$", name))
    head = sum(size for name, size in sizes.items() if name.startswith("lm_head."))
    tied = bool(config["tie_word_embeddings"])
    active = sum(sizes.values()) - sum(routed.values()) // experts * (experts - top_k)

    count = count_from_shape(shape_from_config(config))
    assert count.total == sum(sizes.values())
    assert count.routed == sum(routed.values())
    assert count.per_expert * experts * len(blocks) == count.routed
    assert count.active == active
    assert count.active_without_input_embedding == active - (0 if tied else embedding)
    assert count.active_without_embeddings == active - embedding - head


@pytest.mark.parametrize("case", [case for case in SMALL_CASES if case.family != "dbrx"], ids=str)
def test_every_figure_is_that_of_the_live_module(case: Case) -> None:
    config, model = build(case)
    assert asdict(count_from_shape(shape_from_config(config))) == asdict(count_parameters(model))


def test_experts_that_are_one_matrix_are_not_guessed() -> None:
    with pytest.raises(ValueError, match="which is not stacked over its router's 6 experts"):
        count_parameters(build(Case("dbrx", DBRX_SMALL))[1])


def test_experts_beside_their_router() -> None:
    """JetMoE: stacks of feed-forward experts and of attention heads, with a router and a bias for all."""
    change = {**SMALL, **MIXTRAL_EXPERTS, "kv_channels": 8, "num_key_value_heads": 4}
    _, model = build(Case("jetmoe", change))
    stacks = {name: param.numel() for name, param in model.named_parameters() if param.ndim == 3}
    assert len(stacks) == 4 * SMALL["num_hidden_layers"]
    count = count_parameters(model)
    assert count.total == sum(param.numel() for param in model.parameters())
    assert count.routed == sum(stacks.values())
    assert count.active == count.total - count.routed // 2  # 2 of 4
    # Up and gate of 40 each and down, of 24.
    assert count.per_expert == 3 * 40 * 24


def test_experts_that_cannot_be_counted_are_refused_by_name() -> None:
    longcat = {
        **{key: value for key, value in SMALL.items() if key != "num_hidden_layers"},
        **{key: value for key, value in LATENT.items() if key not in ("n_group", "topk_group")},
        **{"num_layers": 2, "zero_expert_num": 2, "moe_topk": 3, "ffn_hidden_size": 40},
        "expert_ffn_hidden_size": 14,
    }
    with pytest.raises(ConfigError, match=r"zero_expert_num=2: tokens also choose experts that compute noth"):
        count_parameters(build(Case("longcat_flash", longcat))[1])
    doge = {**SMALL, "is_moe": True, "num_experts": 16, "num_experts_per_tok": 4}
    with pytest.raises(ConfigError, match=r"layers.0.mlp='DogeCDMoE': its experts are rows of embeddings"):
        count_parameters(build(Case("doge", doge))[1])
    # Dense by default.
    _, dense = build(Case("doge", SMALL))
    count = count_parameters(dense)
    assert count.total == count.active == sum(param.numel() for param in dense.parameters())


@each(("family", "change"), UNTABLED)
def test_families_beyond_the_table_are_counted_from_their_modules(
    family: str, change: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=f"model_type='{family}': .*--from-module"):
        shape_from_config({"model_type": family})
    _, model = build(Case(family, {**SMALL, **change}))
    stacks = sum(param.numel() for name, param in model.named_parameters() if ".experts." in name)
    count = count_parameters(model)
    assert count.total == sum(param.numel() for param in model.parameters())
    assert stacks and count.active == count.total - stacks * 2 // 3  # 2 of 6


def test_every_family_is_tested() -> None:
    wrapped = {name for name, family in FAMILIES.items() if family.part}
    assert {case.family for case in SMALL_CASES} == FAMILIES.keys() - wrapped
    assert {case.family for case in DEFAULT_CASES} == FAMILIES.keys() - wrapped
    assert set(known_families()) == {*FAMILIES, "graft_moe"}


def test_windows_are_those_of_the_layers() -> None:
    for case in SMALL_CASES:
        config, model = build(case)
        layers = [module for module in model.modules() if hasattr(module, "q_proj")]
        shape = shape_from_config(config)
        if case.family in ("mistral", "mixtral", "phi3", "phimoe", "dbrx"):  # handed over at each call
            windows = [config.get("sliding_window")] * len(shape.layers)
        elif case.family in ("llama4_text", "jamba") or case.family.startswith("deepseek"):
            continue
        else:
            windows = [getattr(layer, "sliding_window", None) or None for layer in layers]
        assert [layer.sliding_window for layer in shape.attention] == windows, case  # type: ignore[attr-defined]


def test_chunks_of_llama4() -> None:
    case = next(case for case in SMALL_CASES if case.family == "llama4_text")
    config, _ = build(case)
    # Every fourth layer has no rotary positions and attends to everything.
    expected = [3, 3, 3, None, 3]
    assert [mixer.chunk for mixer in shape_from_config(config).attention] == expected  # type: ignore[attr-defined]
    published = {key: value for key, value in config.items() if key not in ("layer_types", "moe_layers")}
    assert shape_from_config(published) == shape_from_config(config)
    published.pop("no_rope_layers")
    assert shape_from_config(published) == shape_from_config(config)


def test_mixers_of_jamba() -> None:
    case = next(case for case in SMALL_CASES if case.family == "jamba")
    config, _ = build(case)
    shape = shape_from_config(config)
    is_mamba = [isinstance(mixer, MambaShape) for mixer in shape.attention]
    assert is_mamba == [True, False, True, True, False, True]
    automatic = shape_from_config({**config, "mamba_dt_rank": "auto"}).attention[0]
    assert isinstance(automatic, MambaShape) and automatic.dt_rank == 2  # ceil(24 / 16)


@pytest.mark.parametrize(("whole", "part"), [("llama4", "llama4_text"), ("gemma3", "gemma3_text")])
def test_the_text_part_of_a_larger_model(whole: str, part: str) -> None:
    case = next(case for case in SMALL_CASES if case.family == part)
    text, _ = build(case)
    shape = shape_from_config({"model_type": whole, "text_config": text, "vision_config": {}})
    assert shape.part == "text tower" and not shape_from_config(text).part
    assert count_from_shape(shape) == count_from_shape(shape_from_config(text))
    with pytest.raises(ConfigError, match=f"text_config=None: the config of {whole} needs this key"):
        shape_from_config({"model_type": whole})
    with pytest.raises(ConfigError, match=f"the config of {whole} in text_config needs"):
        shape_from_config({"model_type": whole, "text_config": {}})


def test_the_published_gemma3_leaves_defaults_out() -> None:
    from transformers import Gemma3TextConfig

    # The text part of google/gemma-3-4b, whose other values are the class's defaults.
    stated = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
    }
    whole = {"model_type": "gemma3", "text_config": {**stated, "model_type": "gemma3_text"}}
    read = shape_from_config(whole)
    full = shape_from_config(Gemma3TextConfig(**stated).to_dict())
    assert (read.layers, read.vocab_size, read.tied_embeddings) == (full.layers, full.vocab_size, True)


def test_the_number_of_kv_heads_must_be_stated() -> None:
    config = {**SMALL, "model_type": "mistral"}
    del config["num_key_value_heads"]
    with pytest.raises(ConfigError, match="num_key_value_heads=None: the config of mistral needs this key"):
        shape_from_config(config)
    stated = shape_from_config({**config, "num_key_value_heads": None})
    assert stated.attention[0].cache_width == 2 * 24  # null is as many as query heads


def test_missing_keys_of_nested_configs_are_told() -> None:
    with pytest.raises(ConfigError) as caught:
        shape_from_config({**DBRX_SMALL, "model_type": "dbrx", "ffn_config": {"moe_top_k": 2}})
    paths = [mistake.path for mistake in caught.value.mistakes]
    assert paths == ["ffn_config.ffn_hidden_size", "ffn_config.moe_num_experts"]


@pytest.mark.parametrize(
    ("model_type", "values", "path"),
    [
        ("llama", {"hidden_size": [32]}, "hidden_size"),
        ("llama", {"rope_scaling": 3, "num_key_value_heads": {}}, "num_key_value_heads"),
        ("gemma3_text", {"layer_types": 5}, "model_type"),
    ],
)
def test_values_of_other_types_are_a_sentence(model_type: str, values: dict[str, Any], path: str) -> None:
    config = AutoConfig.for_model(model_type).to_dict() | values
    with pytest.raises(ConfigError) as caught:
        shape_from_config(config)
    assert [mistake.path for mistake in caught.value.mistakes] == [path]


def test_other_rhythms_of_deepseek_are_refused() -> None:
    config = {**SMALL, **LATENT, "model_type": "deepseek_v3", "n_shared_experts": 1, "moe_layer_freq": 2}
    with pytest.raises(ConfigError, match="moe_layer_freq=2: only experts in every layer are known"):
        shape_from_config(config)
    assert len(shape_from_config({**config, "moe_layer_freq": 1}).moe) == 3
    assert len(attention_from_config({**config, "moe_layer_freq": 1})) == 5
