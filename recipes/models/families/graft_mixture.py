"""A mixture in Graft's own format as input: its config says what its layers and routers are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moe.errors import ConfigError, ModelError
from moe.routers import router_class
from recipes.models.export.graft_format import GraftExporter, built_model
from recipes.models.export.placement import Placement
from recipes.models.export.spec import ModelSpec, describe_model
from recipes.models.families.source_mixture import (
    SourceExporter,
    SourceMixture,
    SourceRouter,
    read_routers,
)
from recipes.models.hf.config_file import read_config
from recipes.models.hf.deferred_init import parameters_on_meta
from recipes.models.hf.ffn_names import ModelNames
from recipes.models.hf.state_dict_map import StateDictMap, kept_specs, tied_names
from recipes.models.safetensors.dense_files import DenseFiles
from recipes.runtime.safetensors_codec import TensorSpec


class GraftSource(GraftExporter, SourceExporter):
    """Graft's own format, with the dtypes and the config of the export that was read."""

    def __init__(self, folder: Path, files: DenseFiles) -> None:
        self._folder = folder
        self._tensors = files.tensors
        floating = [t.spec.dtype for t in files.tensors.values() if t.spec.dtype.is_floating_point]
        self.dtype = max(sorted(set(floating), key=str), key=floating.count)

    def written(self, tensor: TensorSpec, wanted: torch.dtype | None) -> TensorSpec:
        """See `Exporter.written`; in the source's dtype all dtypes are those of the source."""
        if tensor.name not in self._tensors:
            remedy = "Export the run again."
            raise ModelError.one("dense", str(self._folder), f"no file holds {tensor.name}", remedy)
        if wanted == self.dtype:
            return self._tensors[tensor.name].spec
        return super().written(tensor, wanted)

    def written_config(self, spec: ModelSpec, dtype: torch.dtype) -> dict[str, Any]:
        """See `Exporter.written_config`; routers may balance otherwise than before."""
        return read_config(self._folder) | super().written_config(spec, dtype)


def graft_router(folder: Path) -> SourceRouter:
    """Returns the router of an export in Graft's format.

    Raises:
        ModelError: Its layers have several, or its attention consists of experts.
    """
    content = read_config(folder)
    rule = None
    if content.get("attention_layers"):
        rule = "its attention consists of experts, which are not read yet"
    entries = content.get("moe_layers") or [{}]
    kinds = [(entry.get("router"), entry.get("shapes", {}).get("w_up_EUD", [None])[0]) for entry in entries]
    if any(kind != kinds[0] for kind in kinds):
        rule = "its layers have routers, or numbers of experts, of several kinds"
    if rule is not None:
        raise ModelError.one("dense", str(folder), rule, "Give another mixture.")
    router, num_experts = kinds[0]
    try:
        config = router_class(router["name"]).config_class(**router)
    except (KeyError, TypeError, ConfigError) as error:
        rule = f"its config.json has no router that this version knows ({error})"
        raise ModelError.one("dense", str(folder), rule, "Export the run again.") from error
    return SourceRouter(config, num_experts, True)


def open_graft(folder: Path, *, trust_remote_code: bool = False) -> SourceMixture:
    """Describes an export in Graft's format, and reads its routers.

    Raises:
        ModelError: Its files are not whole, or it has attention experts.
    """
    graft_router(folder)
    model = built_model(folder, trust_remote_code, parameters_on_meta)
    spec, files = describe_model(model), DenseFiles(folder, finite=True)
    kept, tied = kept_specs(model, StateDictMap(spec)), tied_names(model)
    state = model.module.state_dict()
    names = ModelNames(
        config=model.config,
        architecture=spec.architecture,
        ffns=(),
        state={tensor.name: tensor.shape for tensor in kept},
        tied=dict.fromkeys(tied, ""),
        in_state=lambda name: name,
        ignored=(),
        whole=frozenset(name for name, tensor in state.items() if not tensor.is_floating_point()),
    )
    source = GraftSource(folder, files)
    placement = Placement(spec, source, kept, None)
    read_routers(spec, placement, files)
    stored = {name: name for name in names.state}
    return SourceMixture(source.title, (), names, files, stored, spec, source, placement, trust_remote_code)
