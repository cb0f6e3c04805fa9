"""What a conversion will do, all of it known before the first weight is read.

Letters: D model width, E experts, F width of a feed-forward network.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moe.draws import seeded_generator
from moe.errors import ConfigError, HostError, Mistake
from moe.routers import Router, router_class
from moe.routers.base import RouterConfig
from moe.upcycle import UpcycleMethod, upcycle_methods
from moe.upcycle.base import UpcycleConfig
from moe.upcycle.build import DenseMatrix, router_start
from moe.upcycle.plan import Draws, FFNShape, LayerPlan, Matrix
from moe.upcycle.router_start import start_rows, take_given_rows
from recipes.convert.dense import DenseFiles
from recipes.hosts.exporters import Exporter, choose_exporter, exporters
from recipes.hosts.exporters.base import Layout
from recipes.hosts.ffn_names import FFNNames, HostNames, MatrixName, read_names
from recipes.hosts.placement import Placement
from recipes.hosts.spec import MixtureSpec, ModelSpec
from recipes.hosts.tensor_files import TensorSpec

# Left over from versions of transformers that saved them; every reader computes them anew.
_LEFTOVERS = (r"rotary_emb\.inv_freq$", r"\.attn\.(masked_)?bias$", r"\.attention\.(masked_)?bias$")


@dataclass(frozen=True)
class ConversionRequest:
    """What a user asks for.

    Attributes:
        dense: The dense checkpoint.
        method: How it becomes a mixture.
        router: The router's config.
        seed: Of routers and methods, as in a training run.
        dtype: Of the output; None as the input.
        target: Name of a format; ``auto`` for the best that holds it exactly.
        layout: Of the experts' tensors.
        untie: Whether to write a head of its own where the model ties it to the embeddings.
        trust_remote_code: Whether the model may bring its own code.
    """

    dense: Path
    method: UpcycleConfig
    router: RouterConfig
    seed: int = 0
    dtype: torch.dtype | None = None
    target: str = "auto"
    layout: Layout = "per_expert"
    untie: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True)
class KeptWork:
    """A tensor that is carried over.

    Attributes:
        name: In the host.
        sources: Its name in each of the checkpoints that it is the mean of.
    """

    name: str
    sources: tuple[tuple[int, str], ...]

    @property
    def key(self) -> str:
        """For the journal."""
        return f"kept {self.name}"


@dataclass(frozen=True)
class ExpertWork:
    """One matrix (or bias) of one dense network, which goes into all experts of its layer.

    Attributes:
        ffn: The network.
        source: Of which checkpoint.
        matrix: Which matrix.
        bias: Its bias instead.
        where: In that checkpoint's files.
    """

    ffn: FFNNames
    source: int
    matrix: Matrix
    bias: bool
    where: MatrixName

    @property
    def key(self) -> str:
        """For the journal."""
        return f"{'bias' if self.bias else 'matrix'} {self.ffn.layer} {self.source} {self.matrix}"


@dataclass(frozen=True)
class RouterWork:
    """The router of a layer."""

    layer: int

    @property
    def key(self) -> str:
        """For the journal."""
        return f"router {self.layer}"


@dataclass(frozen=True)
class ConstantWork:
    """A tensor that the format has and the model has not."""

    name: str

    @property
    def key(self) -> str:
        """For the journal."""
        return f"constant {self.name}"


Work = KeptWork | ExpertWork | RouterWork | ConstantWork


@dataclass(frozen=True)
class Conversion:
    """A conversion, ready to be carried out.

    Attributes:
        request: What was asked for.
        names: Of the dense host.
        files: The dense checkpoints.
        spec: The mixture.
        plans: Of each mixture, by block.
        routers: Of each mixture, by block; their tensors are what is written.
        exporter: The format.
        refusals: Why native formats were not chosen.
        placement: Where everything goes.
        work: Everything to be done.
        skipped: Tensors of the dense files that no reader needs.
        claims_exact: Whether the method keeps the function under this router.
    """

    request: ConversionRequest
    names: HostNames
    files: tuple[DenseFiles, ...]
    spec: ModelSpec
    plans: Mapping[int, LayerPlan]
    routers: Mapping[int, Router[Any]]
    exporter: Exporter
    refusals: Sequence[str]
    placement: Placement
    work: tuple[Work, ...]
    skipped: tuple[str, ...]
    claims_exact: bool

    @property
    def total_bytes(self) -> int:
        """Of the output's tensors."""
        return sum(spec.num_bytes for spec in self.placement.specs)

    @property
    def main_dtype(self) -> torch.dtype:
        """That of most of the output's bytes."""
        sizes: dict[torch.dtype, int] = {}
        for spec in self.placement.specs:
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.num_bytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    @property
    def config(self) -> dict[str, Any]:
        """The content of ``config.json``, but for the dtype."""
        content = self.exporter.config(self.spec)
        if self.request.untie:
            content["tie_word_embeddings"] = False
        return content


def plan_conversion(
    request: ConversionRequest, statistics: Mapping[int, Mapping[str, torch.Tensor]] | None = None
) -> Conversion:
    """Plans a conversion from configs and file headers alone.

    Args:
        request: What is asked for.
        statistics: By block, for methods that need some; and the router's rows, where somebody gives them.

    Raises:
        HostError: The dense checkpoint or the format cannot be had.
        ConfigError: The method does not fit.
    """
    names = read_names(request.dense, trust_remote_code=request.trust_remote_code)
    chosen = _chosen(names, request.method)
    method = _method(request, chosen[0].shape)
    files = tuple(DenseFiles(Path(p).expanduser()) for p in (request.dense, *method.sources))
    plans = {
        ffn.layer: method.plan(ffn.shape, Draws(request.seed, ffn.layer), _known(method, statistics, ffn))
        for ffn in chosen
    }
    stored, skipped = _resolve(files, names)
    routers = {
        ffn.layer: _router(
            request, ffn, plans[ffn.layer], (statistics or {}).get(ffn.layer, {}), files[0], stored[0]
        )
        for ffn in chosen
    }
    mixtures = tuple(_mixture(ffn, plans[ffn.layer], routers[ffn.layer]) for ffn in chosen)
    spec = ModelSpec(names.config, names.architecture, mixtures)
    exporter, refusals = _exporter(request, spec)
    kept = list(_kept(names, chosen, stored, method.averaged, request.untie))
    kept_specs = [
        TensorSpec(work.name, files[0].tensors[first].spec.dtype, names.state[same])
        for work, same, first in kept
    ]
    placement = Placement(spec, exporter, kept_specs, request.dtype, request.layout)
    work = (
        *(work for work, _, _ in kept),
        *(RouterWork(layer) for layer in plans),
        *(ConstantWork(name) for name in placement.constants),
        *_expert_work(chosen, len(files), stored),
    )
    return Conversion(
        request=request,
        names=names,
        files=files,
        spec=spec,
        plans=plans,
        routers=routers,
        exporter=exporter,
        refusals=refusals,
        placement=placement,
        work=work,
        skipped=skipped,
        claims_exact=all(method.is_exact(router) for router in routers.values()),
    )


def _kept(
    names: HostNames,
    chosen: Sequence[FFNNames],
    stored: Sequence[Mapping[str, str]],
    averaged: Sequence[int],
    untie: bool,
) -> Iterator[tuple[KeptWork, str, str]]:
    """What is carried over: the work, the host's own name of the tensor, its name in the first files."""
    taken = tuple(f"{ffn.site}." for ffn in chosen)
    wanted = {name: name for name in names.state if not name.startswith(taken)}
    if untie:
        wanted |= names.tied
    for name, same in wanted.items():
        sources = tuple((source, stored[source][same]) for source in averaged)
        yield KeptWork(name, sources), same, stored[0][same]


def _method(request: ConversionRequest, shape: FFNShape) -> UpcycleMethod[Any]:
    method: UpcycleMethod[Any] = upcycle_methods()[request.method.name](request.method)
    if unfit := method.check(request.router, shape):
        raise ConfigError([Mistake(u.option, u.value, u.rule, u.remedy) for u in unfit])
    return method.for_router(request.router)


def _known(
    method: UpcycleMethod[Any], statistics: Mapping[int, Mapping[str, torch.Tensor]] | None, ffn: FFNNames
) -> Mapping[str, torch.Tensor]:
    if not method.statistics:
        return {}
    if statistics is None or ffn.layer not in statistics:
        rule = f"it needs statistics of layer {ffn.layer} on real text: {', '.join(method.statistics)}"
        raise ConfigError.one("upcycle.name", method.name, rule, "Gather them first (see docs/upcycling.md).")
    return statistics[ffn.layer]


def _chosen(names: HostNames, config: UpcycleConfig) -> list[FFNNames]:
    try:
        return [names.ffns[i] for i in config.layer_choice.pick(len(names.ffns))]
    except ValueError as error:
        rule, _, remedy = str(error).partition(". ")
        raise ConfigError.one("upcycle.layers", config.layers, rule, remedy) from error


def _router(
    request: ConversionRequest,
    ffn: FFNNames,
    plan: LayerPlan,
    known: Mapping[str, torch.Tensor],
    files: DenseFiles,
    stored: Mapping[str, str],
) -> Router[Any]:
    """As a training run draws it, so that both begin alike; rows of dense neurons are read from the files."""
    cls = router_class(request.router.name)
    router: Router[Any] = cls(request.router, ffn.shape.model_width, len(plan.experts))
    router.reset_parameters(seeded_generator(request.seed, "router", ffn.layer))
    dense = {
        matrix: DenseMatrix(files.read_matrix(_in_files(ffn.matrices[matrix], stored)))
        for matrix in plan.router.matrices
    }
    start_rows(router, router_start(plan.router, dense))
    take_given_rows(router, known)
    return router


def _mixture(ffn: FFNNames, plan: LayerPlan, router: Router[Any]) -> MixtureSpec:
    shape = FFNShape(
        width=plan.expert_width,
        model_width=ffn.shape.model_width,
        gated=ffn.shape.gated,
        activation=ffn.shape.activation,
        up_bias=ffn.shape.up_bias,
        down_bias=ffn.shape.down_bias,
    )
    shared = 0 if plan.shared is None else plan.shared.width
    return MixtureSpec(ffn.layer, ffn.site, router, len(plan.experts), shape, shared)


def _exporter(request: ConversionRequest, spec: ModelSpec) -> tuple[Exporter, Sequence[str]]:
    if request.target == "auto":
        exporter, refusals = choose_exporter(spec)
    else:
        exporter, refusals = exporters()[request.target], ()
        if reason := exporter.refusal(spec):
            raise ConfigError.one(
                "--target", request.target, reason, "Use --target auto, or change the method."
            )
    if request.layout not in exporter.layouts:
        rule = f"the format {exporter.name} is written {' or '.join(exporter.layouts)}"
        raise ConfigError.one("--layout", request.layout, rule, f"Use --layout {exporter.layouts[0]}.")
    return exporter, refusals


def _resolve(files: Sequence[DenseFiles], names: HostNames) -> tuple[list[dict[str, str]], tuple[str, ...]]:
    """The name in each checkpoint's files of everything in the host's state; and what is left over there."""
    stored = [_stored_names(source, names) for source in files]
    return stored, _left_over(files[0], names, set(stored[0].values()))


def _stored_names(files: DenseFiles, names: HostNames) -> dict[str, str]:
    there = {names.in_state(stored): stored for stored in files.tensors}
    missing = [name for name in names.state if name not in there]
    if missing:
        rule = f"{len(missing)} weights are missing from its files, {missing[0]} the first"
        raise HostError.one("dense", str(files.folder), rule, "Download the checkpoint again.")
    for name, shape in names.state.items():
        found = files.tensors[there[name]].spec.shape
        if found != shape:
            rule = f"{name} is {list(found)} in its files and {list(shape)} by config.json"
            raise HostError.one("dense", str(files.folder), rule, "Give the config.json of these weights.")
    return {name: there[name] for name in names.state}


def _left_over(files: DenseFiles, names: HostNames, used: set[str]) -> tuple[str, ...]:
    """Tensors that have no place in the host; those that transformers would miss nothing of are skipped."""
    left = sorted(n for n in set(files.tensors) - used if names.in_state(n) not in names.tied)
    patterns = (*_LEFTOVERS, *names.ignored)
    unknown = [name for name in left if not any(re.search(pattern, name) for pattern in patterns)]
    if unknown:
        rule = f"its files hold {len(unknown)} weights that config.json has no place for, {unknown[0]} the"
        remedy = "Give the config.json of these weights."
        raise HostError.one("dense", str(files.folder), f"{rule} first", remedy)
    return tuple(left)


def _expert_work(
    chosen: Sequence[FFNNames], num_sources: int, stored: Sequence[Mapping[str, str]]
) -> Iterator[ExpertWork]:
    for ffn in chosen:
        for source in range(num_sources):
            for bias, where in ((False, ffn.matrices), (True, ffn.biases)):
                for matrix, name in where.items():
                    yield ExpertWork(ffn, source, matrix, bias, _in_files(name, stored[source]))


def _in_files(name: MatrixName, stored: Mapping[str, str]) -> MatrixName:
    """Where a matrix is in the files, whose tensors may have other names than the host's."""
    return replace(name, tensor=stored[name.tensor])
