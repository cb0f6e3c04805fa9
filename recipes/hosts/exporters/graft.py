"""Graft's own format, for mixtures that no class of transformers computes exactly.

A folder with safetensors under the host's own names, and a ``config.json`` of model type ``graft_moe``
that holds the dense host's config and how to rebuild router and experts. transformers refuses to
load it as something else; `load_graft` does.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moe.dispatch.local import LocalDispatcher
from moe.errors import HostError
from moe.experts import Experts
from moe.layer import MoELayer
from moe.routers import router_class
from moe.types import LayerContext
from moe.upcycle.weights import ExpertBank
from recipes.hosts.exporters.base import Exporter
from recipes.hosts.huggingface import HuggingFaceHost
from recipes.hosts.inspection import weight_files

MODEL_TYPE = "graft_moe"


class GraftExporter(Exporter):
    """Writes what any host with any router is, exactly."""

    name = "graft"
    is_native = False

    def refusal(self, host: HuggingFaceHost) -> str | None:
        """Holds everything."""
        return None

    def config(self, host: HuggingFaceHost) -> dict[str, Any]:
        """The host's config and, block by block, router and experts."""
        dense = host.config.to_dict()
        dense["architectures"] = [type(host.model).__name__]
        named = {id(layer): name for name, layer in _named_layers(host)}
        layers = [
            {
                "index": index,
                "name": named[id(layer)],
                "router": dataclasses.asdict(layer.router.config),
                "activation": layer.experts.activation,
                "gated": layer.experts.gated,
                "shapes": {
                    key: list(value.shape) for key, value in layer.experts.named_parameters(recurse=False)
                },
            }
            for index, layer in host.moe_layers()
        ]
        return {"model_type": MODEL_TYPE, "format_version": 1, "dense_config": dense, "moe_layers": layers}

    def rename(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Names stay."""
        yield name, tensor

    def keeps_dtype(self, name: str) -> bool:
        """Routers choose by small differences (a bias moves by 1e-3) that bf16 would round away."""
        return ".router." in name

    def load(self, folder: Path) -> Any:
        """By `load_graft`."""
        return load_graft(folder).model


def _named_layers(host: HuggingFaceHost) -> list[tuple[str, MoELayer]]:
    return [(name, module) for name, module in host.model.named_modules() if isinstance(module, MoELayer)]


def load_graft(folder: Path) -> HuggingFaceHost:
    """Loads a folder that `GraftExporter` wrote; the model generates as any of transformers does.

    Raises:
        HostError: The folder holds something else, or its tensors do not fit its config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if content.get("model_type") != MODEL_TYPE:
        rule = f"its model_type is {content.get('model_type')!r}, not {MODEL_TYPE!r}"
        raise HostError.one("path", str(folder), rule, "Load it with transformers' AutoModelForCausalLM.")
    dense = dict(content["dense_config"])
    config = AutoConfig.for_model(dense.pop("model_type"), **dense)
    model = AutoModelForCausalLM.from_config(config)
    host = HuggingFaceHost(model=model, folder=folder, source_dtype=model.dtype)
    for entry in content["moe_layers"]:
        parent, _, child = entry["name"].rpartition(".")
        setattr(model.get_submodule(parent), child, _empty_layer(entry, host))
    _fill(model, folder)
    return host


def _empty_layer(entry: dict[str, Any], host: HuggingFaceHost) -> MoELayer:
    shapes = entry["shapes"]
    bank = ExpertBank(
        activation=entry["activation"],
        gated=entry["gated"],
        **{
            name: torch.empty(shapes[name]) if name in shapes else None
            for name in ("w_up_EUD", "w_down_EDF", "b_up_EU", "b_down_ED")
        },
    )
    cls = router_class(entry["router"]["name"])
    router = cls(cls.config_class(**entry["router"]), shapes["w_up_EUD"][2], bank.num_experts)
    return MoELayer(router, LocalDispatcher(), Experts(bank), LayerContext(host.context, entry["index"]))


def _fill(model: Any, folder: Path) -> None:
    found: dict[str, Tensor] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            found.update({name: tensors.get_tensor(name) for name in tensors.keys()})  # noqa: SIM118
    missing, unexpected = model.load_state_dict(found, strict=False, assign=True)
    model.tie_weights()
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - {
        name for name, _ in model.named_parameters()
    }
    missing = [name for name in missing if name not in tied and name in model.state_dict()]
    if missing or unexpected:
        rule = f"missing tensors {missing[:3]}, unexpected {unexpected[:3]}"
        raise HostError.one("path", str(folder), rule, "Export the run again.")
