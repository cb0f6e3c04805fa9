"""A mixture of a family of transformers in files.

Letters: D model width, E experts, F expert width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe.errors import FieldError, ModelError
from moe.routers import router_class
from moe.routers.base import Router
from moe.routers.configs import RouterConfig
from moe.upcycle.dense_shape import FFNShape
from recipes.models.export.base import Layout
from recipes.models.export.placement import Placement
from recipes.models.export.spec import ModelSpec, MoESpec
from recipes.models.families import families
from recipes.models.families.base import MoEFamily
from recipes.models.families.source_format import SourceFormat
from recipes.models.families.source_mixture import SourceMixture, SourceRouter, read_routers
from recipes.models.hf.config_file import load_config
from recipes.models.hf.ffn_blocks import activation_of
from recipes.models.hf.ffn_names import ModelNames, model_as_stored, renaming
from recipes.models.hf.hf_model import is_leftover
from recipes.models.hf.inspection import EXPERT_COUNT_KEYS
from recipes.models.safetensors.dense_files import DenseFiles
from recipes.runtime.safetensors_codec import TensorSpec

_MEMORY_FUSED = ("experts.gate_up_proj", "experts.down_proj")


def family_of(config: Any, folder: Path, option: str = "dense") -> MoEFamily:
    """Returns the family of a mixture.

    Args:
        config: transformers' config.
        folder: The checkpoint, for the message.
        option: Option that gave it.

    Raises:
        ModelError: Graft has no adapter for it.
    """
    kind = getattr(config, "model_type", None)
    if kind not in families():
        rule, remedy = "it is dense", "Make a mixture of it with +recipe=upcycle."
        if any(getattr(config, key, None) for key in EXPERT_COUNT_KEYS):
            rule = f"there is no adapter for mixtures of the family {kind!r}"
            remedy = f"There are some for {', '.join(sorted(families()))}."
        raise ModelError.one(option, str(folder), rule, remedy)
    return families()[kind]


def family_router(folder: Path) -> SourceRouter:
    """Returns the router of a mixture.

    Raises:
        ModelError: It is no mixture of a known family, or one whose router Graft does not have.
    """
    config = load_config(folder)
    family = family_of(config, folder)
    model, _ = model_as_stored(folder, config, trust_remote_code=False)
    blocks = dict(_blocks(model, family, folder))
    router = _router_config(family, config, blocks, folder)
    return SourceRouter(router, _num_experts(blocks), "bias_E" in family.router_keys)


def open_family(folder: Path) -> SourceMixture:
    """Describes a mixture, and reads its routers. Code that lies in the folder is not its class's.

    Raises:
        ModelError: It is no mixture of a known family, or its files are not whole.
    """
    config = load_config(folder)
    family = family_of(config, folder)
    model, tied = model_as_stored(folder, config, trust_remote_code=False)
    blocks = dict(_blocks(model, family, folder))
    files = DenseFiles(folder, finite=True)
    names = _names(model, config, tied, blocks)
    stored = _stored(files, names, folder)
    format_ = _format(family, folder, files, blocks, model, stored)
    router = _router_config(family, config, blocks, folder)
    spec = ModelSpec(config, names.architecture, tuple(_moe_specs(family, config, router, blocks)))
    gates = {moe.shared_gate_name: moe for moe in spec.moe_blocks if moe.shared_gate}
    stored |= {name: format_.shared_gate_name(moe) for name, moe in gates.items()}
    state = dict(names.state) | {name: (1, moe.expert.model_width) for name, moe in gates.items()}
    names = replace(names, state=state)
    twins = {name: stored[first] for name, first in _twins(files, names).items()}
    format_.keep(stored, twins)
    kinds = {name: torch.float32 if names.is_float(name) else torch.int64 for name in stored}
    kept = [format_.own(TensorSpec(at, kinds[name], names.state[name])) for name, at in stored.items()]
    kept = [replace(tensor, name=name) for tensor, name in zip(kept, stored, strict=True)]
    used = {each.name for each in Placement(spec, format_, kept, None).specs}
    format_.carry(carried := tuple(sorted(set(files.tensors) - used)))
    placement = Placement(spec, format_, kept, None)
    read_routers(spec, placement, files)
    notes = (*family.left_out(config), *_carried_words(carried))
    return SourceMixture(family.title, notes, names, files, stored, spec, format_, placement, False)


def _carried_words(names: tuple[str, ...]) -> Iterator[str]:
    if names:
        yield (
            f"its class does not read {len(names)} tensors of its files, {names[0]} first: they are not "
            "trained, and are written back as they are"
        )


def _blocks(model: nn.Module, family: MoEFamily, folder: Path) -> Iterator[tuple[int, tuple[str, nn.Module]]]:
    """Yields the index of each block with an MoE layer, the layer's path and the layer."""
    found = [(n, m) for n, m in model.named_modules() if type(m).__name__ == family.block_class]
    if not found:
        rule = f"its config makes no layer with experts ({family.block_class})"
        raise ModelError.one("dense", str(folder), rule, "Train a dense model with +recipe=upcycle.")
    for name, module in found:
        yield next(int(part) for part in reversed(name.split(".")) if part.isdigit()), (name, module)


def _num_experts(blocks: Mapping[int, tuple[str, nn.Module]]) -> int:
    return _experts_of(next(iter(blocks.values()))).shape[0]


def _experts_of(block: tuple[str, nn.Module]) -> Tensor:
    down: Tensor = block[1].experts.down_proj  # type: ignore[union-attr, assignment]
    return down


def _router_config(
    family: MoEFamily, config: Any, blocks: Mapping[int, tuple[str, nn.Module]], folder: Path
) -> RouterConfig:
    try:
        router = family.router(config, len(blocks))
    except FieldError as error:
        rules = [f"{each.path}={each.value}: {each.rule}" for each in error.mistakes]
    except TypeError as error:
        rules = [f"a value that it needs is of another type ({error})"]
    else:
        if (found := router.check(_num_experts(blocks))) is None:
            return router
        rules = [f"{found.path}={found.value}, with {_num_experts(blocks)} experts: {found.rule}"]
    rule = f"Graft has no router for its config.json: {'; '.join(rules)}"
    raise ModelError.one("dense", str(folder), rule, "Give another mixture, or the config.json of this one.")


def _names(
    model: nn.Module, config: Any, tied: Mapping[str, str], blocks: Mapping[int, tuple[str, nn.Module]]
) -> ModelNames:
    sites = tuple(f"{name}." for name, _ in blocks.values())
    state = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not (name in tied or name.startswith(sites))
    }
    return ModelNames(
        config=config,
        architecture=type(model).__name__,
        ffns=(),
        state=state,
        tied=tied,
        in_state=renaming(model),
        ignored=(),
        whole=frozenset(n for n, t in model.state_dict().items() if not t.is_floating_point()),
    )


def _stored(files: DenseFiles, names: ModelNames, folder: Path) -> dict[str, str]:
    """Returns the names in the files of the tensors outside the MoE layers."""
    there = {names.in_state(stored): stored for stored in files.tensors if not is_leftover(stored)}
    for second, first in names.tied.items():
        if first not in there and second in there:
            there[first] = there[second]
    for name in names.state:
        if name not in there:
            raise ModelError.one("dense", str(folder), f"no file holds {name}", "Download it again.")
    return {name: there[name] for name in names.state}


def _twins(files: DenseFiles, names: ModelNames) -> dict[str, str]:
    """Returns the names in the files of tied tensors that they hold twice, with the first's in the model."""
    there = {names.in_state(stored): stored for stored in files.tensors}
    return {there[s]: f for s, f in names.tied.items() if s in there and f in there and f in names.state}


def _format(
    family: MoEFamily,
    folder: Path,
    files: DenseFiles,
    blocks: Mapping[int, tuple[str, nn.Module]],
    model: Any,
    stored: Mapping[str, str],
) -> SourceFormat:
    """Finds how the files name the experts: of the family's own names those that are there."""
    router = family.router_keys["weight_ED"]
    sites = {}
    for index, (name, _) in blocks.items():
        block, _, child = name.rpartition(".")
        prefixes = (block, block.removeprefix(f"{model.base_model_prefix}."))
        wanted = [f"{prefix}.{site}" for prefix in prefixes for site in (family.stored_site, child)]
        sites[index] = next((site for site in wanted if f"{site}.{router}" in files.tensors), wanted[0])
    first = next(iter(sites.values()))
    alone = f"{first}.experts.0.{family.matrices['down']}.weight" in files.tensors
    fused = next((f for f in (family.fused, _MEMORY_FUSED) if f"{first}.{f[1]}" in files.tensors), None)
    layout: Layout = "per_expert" if alone or fused is None else "fused"
    floating = [files.tensors[at].spec.dtype for at in stored.values()]
    # Of dtypes that are as frequent the first by name: all ranks must find the same.
    most = max(sorted(set(floating), key=str), key=floating.count)
    return SourceFormat(family, folder, files.tensors, sites, layout, fused or family.fused, most)


def _moe_specs(
    family: MoEFamily, config: Any, router: RouterConfig, blocks: Mapping[int, tuple[str, nn.Module]]
) -> Iterator[MoESpec]:
    for index, block in blocks.items():
        E, D, F = _experts_of(block).shape
        shape = FFNShape(F, D, gated=True, activation=activation_of(config))
        shared = getattr(block[1], family.shared, None) if family.shared else None
        width = 0 if shared is None else shared.down_proj.weight.shape[1]
        made: Router[Any] = router_class(router.name)(router, D, E)
        yield MoESpec(index, block[0], made, E, shape, width, bool(family.shared_gate and width))
