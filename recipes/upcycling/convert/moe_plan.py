"""Plans the MoE model of a dense checkpoint, from configs and file headers before any weight is read.

The converter writes it into files, and the ranks of a run each make their own part of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from moe.errors import ConfigError, FieldError, ModelError
from moe.routers import router_class
from moe.routers.base import Router
from moe.routers.configs import RouterConfig
from moe.routing.draws import seeded_generator
from moe.upcycle import upcycle_method
from moe.upcycle.base import UpcycleMethod
from moe.upcycle.build_experts import router_start
from moe.upcycle.configs import UpcycleConfig
from moe.upcycle.dense_shape import FFNShape
from moe.upcycle.expert_rows import DenseMatrix
from moe.upcycle.layer_plan import Draws, LayerPlan
from moe.upcycle.router_start import start_rows, take_given_rows
from recipes.models.export.spec import ModelSpec, MoESpec
from recipes.models.hf.ffn_names import FFNNames, MatrixName, ModelNames, read_names
from recipes.models.hf.hf_model import is_leftover
from recipes.models.safetensors.dense_files import DenseFiles

if TYPE_CHECKING:
    from recipes.config.schema import RunConfig

LayerTensors = Mapping[int, Mapping[str, Tensor]]


@dataclass(frozen=True)
class MoERequest:
    """Request that defines an MoE model.

    Attributes:
        dense: The dense checkpoint.
        method: Upcycling method.
        router: The router's config.
        seed: Seed of routers and methods.
        trust_remote_code: Whether the model may bring its own code.
    """

    dense: Path
    method: UpcycleConfig
    router: RouterConfig
    seed: int = 0
    trust_remote_code: bool = False


@dataclass(frozen=True)
class StoredModel:
    """Dense checkpoints of one shape, described by their configs and file headers.

    Attributes:
        names: Names in the model.
        files: The checkpoints; the first is the one that is upcycled.
        stored: For each of them, the names in its files by the names in the model's state.
        skipped: Tensors of the first that no reader needs.
    """

    names: ModelNames
    files: tuple[DenseFiles, ...]
    stored: tuple[Mapping[str, str], ...]
    skipped: tuple[str, ...]

    def where(self, source: int, name: MatrixName) -> MatrixName:
        """Locates a matrix in a checkpoint's files, whose tensors may have other names than the model's."""
        return replace(name, tensor=self.stored[source][name.tensor])

    def close(self) -> None:
        """Closes the files; they are opened again when something is read."""
        for files in self.files:
            files.close()


@dataclass(frozen=True)
class MoEPlan:
    """MoE model, layer by layer.

    Attributes:
        request: What was asked for.
        method: Told of its router.
        names: Names in the model.
        model: Where the dense weights are; None where nobody is to read them.
        ffns: The networks that become MoE models.
        plans: Plan of each MoE layer, by block.
        routers: Router of each MoE layer, by block; the model begins with their tensors.
        spec: The MoE model's shape.
        claims_exact: Whether the method keeps the function under this router.
    """

    request: MoERequest
    method: UpcycleMethod[Any]
    names: ModelNames
    model: StoredModel | None
    ffns: tuple[FFNNames, ...]
    plans: Mapping[int, LayerPlan]
    routers: Mapping[int, Router[Any]]
    spec: ModelSpec
    claims_exact: bool


def request_of(config: RunConfig, dense: Path) -> MoERequest:
    """Returns the request that a config describes, for a dense checkpoint."""
    return MoERequest(dense, config.upcycle, config.router, config.seed, config.trust_remote_code)


def open_dense(
    dense: Path,
    sources: Sequence[str] = (),
    *,
    names: ModelNames | None = None,
    trust_remote_code: bool = False,
) -> StoredModel:
    """Reads the headers of dense checkpoints.

    Args:
        dense: The one that is upcycled.
        sources: Others of the same shape.
        names: Names of the model, where they have been read already.
        trust_remote_code: Whether the model may bring its own code.

    Raises:
        ModelError: A checkpoint is not whole, or not of this model.
    """
    names = names or read_names(dense, trust_remote_code=trust_remote_code)
    files = tuple(DenseFiles(Path(folder).expanduser(), finite=True) for folder in (dense, *sources))
    stored = tuple(_stored_names(each, names) for each in files)
    return StoredModel(names, files, stored, _left_over(files[0], names, set(stored[0].values())))


def plan_moe(request: MoERequest, statistics: LayerTensors | None = None, *, reads: bool = True) -> MoEPlan:
    """Plans an MoE model from configs and file headers; reads only weights that routers begin with.

    Args:
        request: What is asked for.
        statistics: By block, for methods that need some; and the router's rows, where somebody gives them.
        reads: Whether the dense files are there to be read. Else shapes alone are right, as for an MoE model
            whose weights come from a checkpoint.

    Raises:
        ModelError: The dense checkpoint cannot be had.
        ConfigError: The method does not fit.
    """
    names = read_names(request.dense, trust_remote_code=request.trust_remote_code)
    chosen = _chosen(names, request.method)
    method = _method(request, chosen[0].shape)
    model = open_dense(request.dense, method.sources, names=names) if reads else None
    known = statistics or {}
    plans = {
        ffn.layer: method.plan(ffn.shape, Draws(request.seed, ffn.layer), _known(method, known, ffn))
        for ffn in chosen
    }
    routers = {ffn.layer: _draw_router(request, ffn, plans[ffn.layer]) for ffn in chosen}
    if model is not None:
        for ffn in chosen:
            _start_router(routers[ffn.layer], ffn, plans[ffn.layer], known.get(ffn.layer, {}), model)
    moe_blocks = tuple(_moe(ffn, plans[ffn.layer], routers[ffn.layer]) for ffn in chosen)
    return MoEPlan(
        request=request,
        method=method,
        names=names,
        model=model,
        ffns=tuple(chosen),
        plans=plans,
        routers=routers,
        spec=ModelSpec(names.config, names.architecture, moe_blocks),
        claims_exact=all(method.is_exact(router) for router in routers.values()),
    )


def _method(request: MoERequest, shape: FFNShape) -> UpcycleMethod[Any]:
    method = upcycle_method(request.method)
    if unfit := method.check(request.router, shape):
        raise ConfigError(unfit)
    return method.for_router(request.router)


def _known(method: UpcycleMethod[Any], statistics: LayerTensors, ffn: FFNNames) -> Mapping[str, Tensor]:
    if not method.statistics:
        return {}
    if ffn.layer not in statistics:
        rule = f"it needs statistics of layer {ffn.layer} on real text: {', '.join(method.statistics)}"
        raise ConfigError.one("upcycle.name", method.name, rule, "Gather them first (see docs/upcycling.md).")
    return statistics[ffn.layer]


def _chosen(names: ModelNames, config: UpcycleConfig) -> list[FFNNames]:
    try:
        return [names.ffns[i] for i in config.layer_choice.pick(len(names.ffns))]
    except FieldError as error:
        raise error.under("upcycle") from error


def _draw_router(request: MoERequest, ffn: FFNNames, plan: LayerPlan) -> Router[Any]:
    """Draws a router alike in converter and training run, so that both begin alike."""
    cls = router_class(request.router.name)
    router: Router[Any] = cls(request.router, ffn.shape.model_width, len(plan.experts))
    router.reset_parameters(seeded_generator(request.seed, "router", ffn.layer))
    return router


def _start_router(
    router: Router[Any], ffn: FFNNames, plan: LayerPlan, known: Mapping[str, Tensor], model: StoredModel
) -> None:
    """Reads rows of dense neurons from the files."""
    dense = {
        matrix: DenseMatrix(model.files[0].read_matrix(model.where(0, ffn.matrices[matrix])))
        for matrix in plan.router.matrices
    }
    start_rows(router, router_start(plan.router, dense))
    take_given_rows(router, known)


def _moe(ffn: FFNNames, plan: LayerPlan, router: Router[Any]) -> MoESpec:
    shape = replace(ffn.shape, width=plan.expert_width)
    shared = 0 if plan.shared is None else plan.shared.width
    return MoESpec(ffn.layer, ffn.site, router, len(plan.experts), shape, shared)


def _stored_names(files: DenseFiles, names: ModelNames) -> dict[str, str]:
    there = {names.in_state(stored): stored for stored in files.tensors}
    for second, first in names.tied.items():
        # transformers ties both ways: files with the head alone give the embeddings, too.
        if first not in there and second in there:
            there[first] = there[second]
    missing = [name for name in names.state if name not in there]
    if missing:
        rule = f"{len(missing)} weights are missing from its files, {missing[0]} the first"
        raise ModelError.one("dense", str(files.folder), rule, "Download the checkpoint again.")
    for name, shape in names.state.items():
        found, dtype = files.tensors[there[name]].spec.shape, files.tensors[there[name]].spec.dtype
        if not dtype.is_floating_point and names.is_float(name):
            rule = f"{name} is {str(dtype).removeprefix('torch.')} in its files: it is quantised"
            remedy = "Give the checkpoint that it was quantised from."
            raise ModelError.one("dense", str(files.folder), rule, remedy)
        if found != shape:
            rule = f"{name} is {list(found)} in its files and {list(shape)} by config.json"
            raise ModelError.one("dense", str(files.folder), rule, "Give the config.json of these weights.")
    return {name: there[name] for name in names.state}


def _left_over(files: DenseFiles, names: ModelNames, used: set[str]) -> tuple[str, ...]:
    """Returns the tensors that the model has no place for, but for those that transformers ignores."""
    left = sorted(n for n in set(files.tensors) - used if names.in_state(n) not in names.tied)
    unread = [name for name in left if not is_leftover(name)]
    unknown = [name for name in unread if not any(re.search(pattern, name) for pattern in names.ignored)]
    if unknown:
        rule = f"its files hold {len(unknown)} weights that config.json has no place for, {unknown[0]} the"
        remedy = "Give the config.json of these weights."
        raise ModelError.one("dense", str(files.folder), f"{rule} first", remedy)
    return tuple(left)
