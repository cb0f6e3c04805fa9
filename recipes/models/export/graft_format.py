"""Graft's own format, for MoE models that no class of transformers computes exactly.

It is a folder with safetensors under the dense model's names, experts by their global number, and a
``config.json`` of model type ``graft_moe`` with the dense model's config and the settings of routers and
experts. transformers loads it after ``import recipes.models.auto``; without that import it rejects the
unknown type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.attention.routed_attention import AttentionContext
from moe.dispatch.local import LocalDispatcher
from moe.errors import ModelError
from moe.experts.experts import Experts
from moe.experts.shared import SharedExpert
from moe.experts.weights import ExpertBank, FFNWeights
from moe.layer import MoELayer
from moe.routers import router_class
from moe.types import LayerContext
from moe.upcycle.dense_shape import Matrix
from recipes.models.export.base import Exporter
from recipes.models.export.placement import Placement
from recipes.models.export.read_back import Unread
from recipes.models.export.spec import AttentionSpec, ModelSpec, MoESpec, describe_model
from recipes.models.hf.attention_blocks import RoutedSelfAttention, attention_sites
from recipes.models.hf.config_file import inner_config, library_reads, read_config
from recipes.models.hf.deferred_init import parameters_on_meta
from recipes.models.hf.hf_model import HFModel
from recipes.models.hf.state_dict_map import StateDictMap, kept_specs, tied_names
from recipes.models.safetensors.dense_files import DenseFiles

MODEL_TYPE = "graft_moe"
FORMAT_VERSION = 2
#: Version of models with attention experts, which readers of version 2 would take for dense attention.
ATTENTION_VERSION = 3


class GraftExporter(Exporter):
    """Writes any model with any router exactly."""

    name = "graft"
    title = "Graft's own format"
    is_native = False

    def unsupported_reason_of_its_models(self, spec: ModelSpec) -> str | None:
        """Rejects nothing."""
        return None

    def config(self, spec: ModelSpec) -> dict[str, Any]:
        """Builds the dense model's config and, block by block, the settings of router and experts."""
        # config.json states the dtype by itself; the cache is off for training only; paths are nobody's.
        left_out = ("dtype", "use_cache", "_name_or_path")
        dense = {k: v for k, v in spec.config.to_dict().items() if k not in left_out}
        dense["architectures"] = [spec.architecture]
        content = {
            "model_type": MODEL_TYPE,
            "format_version": FORMAT_VERSION,
            "architectures": ["GraftMoEForCausalLM"],
            "dense_config": dense,
            "moe_layers": [_entry(moe) for moe in spec.moe_blocks],
        }
        if not spec.attention:
            return content
        attention = [_attention_entry(one) for one in spec.attention]
        return content | {"format_version": ATTENTION_VERSION, "attention_layers": attention}

    def expert_name(self, moe: MoESpec, expert: int, matrix: Matrix, bias: bool) -> str:
        """See `Exporter.expert_name`; experts are numbered over all ranks."""
        return f"{moe.site}.experts.{expert}.{matrix}.{'bias' if bias else 'weight'}"

    def shared_name(self, moe: MoESpec, matrix: Matrix, bias: bool) -> str:
        """See `Exporter.shared_name`."""
        return f"{moe.site}.shared.{matrix}.{'bias' if bias else 'weight'}"

    def router_name(self, moe: MoESpec, key: str) -> str:
        """Returns the name in the model."""
        return f"{moe.site}.router.{key}"

    def keeps_dtype(self, name: str) -> bool:
        """Keeps routers: they choose by small differences (a bias moves by 1e-3), which bf16 rounds away."""
        return ".router." in name

    def open(self, folder: Path, *, trust_remote_code: bool = False) -> Unread:
        """See `Exporter.open`; reads as `load_graft` does."""
        return GraftUnread(folder, trust_remote_code=trust_remote_code)


class GraftUnread(Unread):
    """Exported model that is read as by `load_graft`, a part of the files at a time."""

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        """Reads the config and the names in the files."""
        self._model = built_model(folder, trust_remote_code, parameters_on_meta)
        super().__init__(self._model.module.float().eval(), folder)
        self._weights = _Weights(self._model, folder)

    def fill(self, wanted: Callable[[str], bool]) -> None:
        """See `Unread.fill`."""
        self._weights.fill(torch.float32, wanted)
        for module in self.model.modules():
            # Routers keep the dtype of the files until here.
            for name, parameter in module._parameters.items():
                if parameter is not None and not parameter.is_meta and parameter.dtype != torch.float32:
                    module._parameters[name] = torch.nn.Parameter(parameter.float(), requires_grad=False)


def _entry(moe: MoESpec) -> dict[str, Any]:
    shape = moe.expert
    E, D, F = moe.num_experts, shape.model_width, shape.width
    U = 2 * F if shape.gated else F
    shapes = {"w_up_EUD": [E, U, D], "w_down_EDF": [E, D, F]}
    if shape.up_bias:
        shapes["b_up_EU"] = [E, U]
    if shape.down_bias:
        shapes["b_down_ED"] = [E, D]
    return {
        "index": moe.index,
        "name": moe.site,
        "router": dataclasses.asdict(moe.router.config),
        "activation": shape.activation,
        "gated": shape.gated,
        "shapes": shapes,
        "shared_width": moe.shared_width,
    }


def _attention_entry(attention: AttentionSpec) -> dict[str, Any]:
    return {
        "index": attention.index,
        "name": attention.site,
        "router": dataclasses.asdict(attention.router.config),
        "scale": attention.scale,
    }


def load_graft(folder: Path, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False) -> HFModel:
    """Loads a folder that `GraftExporter` wrote; the model generates like any model of transformers.

    Args:
        folder: The export.
        dtype: Dtype of the floating-point tensors; None as in the files.
        trust_remote_code: Whether a model that brings code of its own may run it.

    Raises:
        ModelError: The folder holds something else, its tensors do not fit its config, or it needs code that
            is not trusted.
    """
    model = built_model(folder, trust_remote_code)
    _Weights(model, folder).fill(dtype)
    return model


def built_model(
    folder: Path, trust: bool, memory: Callable[[], AbstractContextManager[None]] = nullcontext
) -> HFModel:
    """Builds the model of a folder's config, without reading its weights.

    Args:
        folder: The export.
        trust: Whether a model that brings code of its own may run it.
        memory: Context in which parameters are made, other than those of routers.
    """
    from transformers import AutoModelForCausalLM

    content = read_config(folder, "path")
    if content.get("model_type") != MODEL_TYPE:
        rule = f"its model_type is {content.get('model_type')!r}, not {MODEL_TYPE!r}"
        raise ModelError.one("path", str(folder), rule, "Load it with transformers' AutoModelForCausalLM.")
    known = ATTENTION_VERSION if "attention_layers" in content else FORMAT_VERSION
    if content.get("format_version") != known:
        rule = f"its format_version is {content.get('format_version')}, and {known} is known here"
        raise ModelError.one("path", str(folder), rule, "Export the run again with this version of Graft.")
    config, runs_code = inner_config(content["dense_config"], folder, trust_remote_code=trust)
    with library_reads("path", folder, "Export the run again.", "build its dense model"), memory():
        module = AutoModelForCausalLM.from_config(config, trust_remote_code=runs_code)
    model = HFModel(module=module, folder=folder, source_dtype=module.dtype, trust_remote_code=trust)
    for entry in content["moe_layers"]:
        parent, _, child = entry["name"].rpartition(".")
        setattr(module.get_submodule(parent), child, _empty_layer(entry, model, memory))
    for entry in content.get("attention_layers", []):
        _cut_attention(entry, model, memory)
    return model


def _cut_attention(
    entry: Mapping[str, Any], model: HFModel, memory: Callable[[], AbstractContextManager[None]]
) -> None:
    """Replaces an attention by experts, whose weights are read later."""
    (site,) = attention_sites(model, [entry["index"]])
    heads, width = model.config.num_key_value_heads, model.config.hidden_size
    cls = router_class(entry["router"]["name"])
    router = cls(cls.config_class(**entry["router"]), width, heads)
    context = AttentionContext(model.context, entry["index"])
    with memory():
        site.replace(RoutedSelfAttention(site.dense, router, context, entry["scale"]))


def _empty_layer(
    entry: Mapping[str, Any], model: HFModel, memory: Callable[[], AbstractContextManager[None]]
) -> MoELayer:
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
    with memory():
        experts = Experts(bank)
        shared = SharedExpert(_empty_shared(entry, bank)) if entry["shared_width"] else None
    return MoELayer(router, LocalDispatcher(), experts, LayerContext(model.context, entry["index"]), shared)


def _empty_shared(entry: Mapping[str, Any], bank: ExpertBank) -> FFNWeights:
    F, D = entry["shared_width"], bank.w_up_EUD.shape[2]
    biased = bank.b_up_EU is not None
    return FFNWeights(
        up_FD=torch.empty(F, D),
        down_DF=torch.empty(D, F),
        activation=bank.activation,
        gate_FD=torch.empty(F, D) if bank.gated else None,
        b_gate_F=torch.empty(F) if bank.gated and biased else None,
        b_up_F=torch.empty(F) if biased else None,
        b_down_D=None if bank.b_down_ED is None else torch.empty(D),
    )


class _Weights:
    """Reader of a model's tensors from the files of a folder.

    Raises:
        ModelError: A tensor is missing from the files or does not belong to the model.
    """

    def __init__(self, model: HFModel, folder: Path) -> None:
        spec, self._files, self._model = describe_model(model), DenseFiles(folder), model
        self._live = StateDictMap(spec)
        self._placement = Placement(spec, GraftExporter(), kept_specs(model, self._live), None)
        wanted, there = {spec.name for spec in self._placement.specs}, self._files.tensors.keys()
        tied = tied_names(model)
        missing, unexpected = sorted(wanted - there), sorted(there - wanted - tied)
        if missing or unexpected:
            rule = f"missing tensors {missing[:3]}, unexpected {unexpected[:3]}"
            raise ModelError.one("path", str(folder), rule, "Export the run again.")
        own = model.module.state_dict()
        self._shapes = {name: tensor.shape for name, tensor in own.items() if name not in tied}

    @torch.no_grad()
    def fill(self, dtype: torch.dtype | None, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Reads the tensors whose names in the model are wanted."""
        filled = {
            name: _read(name, shape, self._live, self._placement, self._files, dtype)
            for name, shape in self._shapes.items()
            if wanted(name)
        }
        self._files.close()
        self._model.module.load_state_dict(filled, strict=False, assign=True)
        self._model.module.tie_weights()


def _read(
    name: str,
    shape: Sequence[int],
    live: StateDictMap,
    placement: Placement,
    files: DenseFiles,
    dtype: torch.dtype | None,
) -> Tensor:
    router, parts = live.router(name), live.pieces(name)
    if router is not None:
        return files.read(placement.router(router.layer, router.key))
    if parts is None:
        tensor = files.read(placement.kept(name))
        casts = dtype is not None and tensor.is_floating_point() and not GraftExporter().keeps_dtype(name)
        return tensor.to(dtype) if casts else tensor
    first = files.read(placement.slot(parts[0].piece).name)
    stacked = torch.empty(tuple(shape), dtype=dtype or first.dtype)
    for part in parts:
        part.of(stacked).copy_(files.read(placement.slot(part.piece).name))
    return stacked
