"""Graft's own export: a dense config with the MoE blocks of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from moe.accounting.attention_experts import AttentionExpertsShape
from moe.accounting.families.reading import LayerConfig, check_keys, reject
from moe.accounting.layers import ModelShape, MoEShape
from moe.accounting.mixers import AttentionShape, Mixer
from moe.accounting.router_elements import router_elements
from moe.routers import router_class
from moe.routers.base import Router

MODEL_TYPE = "graft_moe"
# The first has no shared experts.
FORMAT_VERSIONS = (1, 2)
# With experts of attention.
ATTENTION_VERSION = 3
ATTENTION_KEYS = ("index", "router")
LAYER_KEYS = ("index", "router", "gated", "shapes.w_up_EUD", "shapes.w_down_EDF")
KNOWN_SHAPES = {"w_up_EUD", "w_down_EDF", "b_up_EU", "b_down_ED"}
KNOWN_KEYS = {"index", "name", "router", "activation", "gated", "shapes", "shared_width"}


def with_moe_blocks(config: LayerConfig, dense: ModelShape) -> ModelShape:
    """Inserts the MoE blocks into the dense model.

    Routers are built on the meta device, so that all of their elements are counted.

    Args:
        config: The content of an exported ``config.json``.
        dense: Shape of its ``dense_config``.

    Raises:
        ConfigError: The format is unknown.
    """
    version = config.get("format_version")
    known = (ATTENTION_VERSION,) if "attention_layers" in config else FORMAT_VERSIONS
    if version not in known:
        rule = f"only formats {known} are known here"
        reject("format_version", version, rule, "Use the version of Graft that wrote it.")
    check_keys(config, MODEL_TYPE, ("moe_layers",))
    layers = list(dense.layers)
    for number, entry in enumerate(config["moe_layers"]):
        where = f"moe_layers[{number}]"
        check_keys(entry, f"{MODEL_TYPE} in {where}", LAYER_KEYS)
        unknown = {*(set(entry) - KNOWN_KEYS), *(set(entry["shapes"]) - KNOWN_SHAPES)}
        if unknown:
            reject(where, sorted(unknown), "no accounting knows these parts of a layer", "Correct it.")
        index = _index(entry, where, len(layers))
        layers[index] = replace(layers[index], ffn=_moe(entry, where))
    for number, entry in enumerate(config.get("attention_layers", ())):
        where = f"attention_layers[{number}]"
        check_keys(entry, f"{MODEL_TYPE} in {where}", ATTENTION_KEYS)
        if unknown := set(entry) - {*ATTENTION_KEYS, "name", "scale"}:
            reject(where, sorted(unknown), "no accounting knows these parts of a layer", "Correct it.")
        index = _index(entry, where, len(layers))
        experts = _attention(entry, where, layers[index].attention, dense.hidden_size)
        layers[index] = replace(layers[index], attention=experts)
    return replace(dense, layers=tuple(layers))


def _index(entry: Mapping[str, Any], where: str, num_layers: int) -> int:
    index: int = entry["index"]
    if not 0 <= index < num_layers:
        reject(f"{where}.index", index, f"the dense model has {num_layers} layers", "Correct it.")
    return index


def _attention(entry: Mapping[str, Any], where: str, dense: Mixer, hidden: int) -> AttentionExpertsShape:
    if not isinstance(dense, AttentionShape):
        reject(where, type(dense).__name__, "only plain attention can be cut into experts", "Correct it.")
    router, matrix, vector = _router(entry, where, hidden, dense.num_kv_heads)
    return AttentionExpertsShape(dense, router.top_k, matrix, vector)


def _moe(entry: Mapping[str, Any], where: str) -> MoEShape:
    shapes = entry["shapes"]
    experts, _, hidden = shapes["w_up_EUD"]
    biases = {name in shapes for name in ("b_up_EU", "b_down_ED")}
    if len(biases) == 2:
        reject(f"{where}.shapes", sorted(shapes), "one of two biases is known only with the other", "Add it.")
    router, matrix, vector = _router(entry, where, hidden, experts)
    bias = biases == {True}
    return MoEShape(
        num_experts=experts,
        top_k=router.top_k,
        width=shapes["w_down_EDF"][2],
        gated=entry["gated"],
        bias=bias,
        shared_width=entry.get("shared_width", 0),
        shared_bias=bias,
        router_matrix=matrix,
        router_vector=vector,
    )


def _router(entry: Mapping[str, Any], where: str, hidden: int, experts: int) -> tuple[Router[Any], int, int]:
    """Returns the router, built on the meta device, and the elements of its matrices and of its rest."""
    name = entry["router"]["name"]
    try:
        cls = router_class(name)
    except KeyError as error:
        reject(f"{where}.router.name", name, "there is no such router", f"{error.args[0]}.")
    try:
        options = cls.config_class(**entry["router"])
    except (TypeError, ValueError) as error:
        reject(f"{where}.router", entry["router"], f"it is no config of {name} ({error})", "Correct it.")
    with torch.device("meta"):
        router = cls(options, hidden, experts)
    return router, *router_elements(router)
