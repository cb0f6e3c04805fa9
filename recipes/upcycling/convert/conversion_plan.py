"""Plan of a conversion, complete before the first weight is read.

Letters: D model width, E experts, F width of a feed-forward network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moe.errors import ConfigError
from moe.routers.base import Router
from moe.upcycle.dense_shape import Matrix
from moe.upcycle.layer_plan import LayerPlan
from recipes.models.export import Exporter, choose_exporter, exporters
from recipes.models.export.base import Layout
from recipes.models.export.placement import Placement
from recipes.models.export.spec import ModelSpec
from recipes.models.hf.ffn_names import FFNNames, MatrixName, ModelNames
from recipes.models.safetensors.dense_files import DenseFiles
from recipes.runtime.safetensors_codec import TensorSpec
from recipes.upcycling.convert.moe_plan import (
    LayerTensors,
    MoEPlan,
    MoERequest,
    StoredModel,
    plan_moe,
)


@dataclass(frozen=True)
class ConversionRequest(MoERequest):
    """Request of a user; the seed is that of a training run.

    Attributes:
        dtype: Dtype of the output; None for that of the input.
        target: Name of a format; ``auto`` for the best that holds it exactly.
        layout: Layout of the experts' tensors.
        untie: Whether to write a head of its own where the model ties it to the embeddings.
    """

    dtype: torch.dtype | None = None
    target: str = "auto"
    layout: Layout = "per_expert"
    untie: bool = False


@dataclass(frozen=True)
class KeptWork:
    """Tensor that is carried over.

    Attributes:
        name: Name in the model.
        sources: Its name in each of the checkpoints that it is the mean of.
    """

    name: str
    sources: tuple[tuple[int, str], ...]

    @property
    def key(self) -> str:
        """Key in the journal."""
        return f"kept {self.name}"


@dataclass(frozen=True)
class ExpertWork:
    """Matrix (or bias) of one dense network, which goes into all experts of its layer.

    Attributes:
        ffn: The network.
        source: Index of the checkpoint.
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
        """Key in the journal."""
        return f"{'bias' if self.bias else 'matrix'} {self.ffn.layer} {self.source} {self.matrix}"


@dataclass(frozen=True)
class RouterWork:
    """Router of a layer."""

    layer: int

    @property
    def key(self) -> str:
        """Key in the journal."""
        return f"router {self.layer}"


@dataclass(frozen=True)
class ConstantWork:
    """Tensor that the format has and the model has not."""

    name: str

    @property
    def key(self) -> str:
        """Key in the journal."""
        return f"constant {self.name}"


Work = KeptWork | ExpertWork | RouterWork | ConstantWork


@dataclass(frozen=True)
class Conversion:
    """Conversion that is ready to be carried out.

    Attributes:
        request: What was asked for.
        names: Names in the dense model.
        files: The dense checkpoints.
        spec: The MoE model.
        plans: Plan of each MoE layer, by block.
        routers: Router of each MoE layer, by block; their tensors are written.
        exporter: The format.
        unsupported_reasons: Why native formats were not chosen.
        placement: Where everything goes.
        work: Everything to be done.
        skipped: Tensors of the dense files that no reader needs.
        claims_exact: Whether the method keeps the function under this router.
    """

    request: ConversionRequest
    names: ModelNames
    files: tuple[DenseFiles, ...]
    spec: ModelSpec
    plans: Mapping[int, LayerPlan]
    routers: Mapping[int, Router[Any]]
    exporter: Exporter
    unsupported_reasons: Sequence[str]
    placement: Placement
    work: tuple[Work, ...]
    skipped: tuple[str, ...]
    claims_exact: bool

    @property
    def total_bytes(self) -> int:
        """Bytes of the output's tensors."""
        return sum(spec.num_bytes for spec in self.placement.specs)

    @property
    def main_dtype(self) -> torch.dtype:
        """Dtype of most of the output's bytes."""
        sizes: dict[torch.dtype, int] = {}
        for spec in self.placement.specs:
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.num_bytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    @property
    def exact_in(self) -> list[str]:
        """Programs that compute exactly this function."""
        return self.exporter.exact_in(self.spec, self.request.layout)

    @property
    def config(self) -> dict[str, Any]:
        """Returns the content of ``config.json``, but for the dtype."""
        content = self.exporter.config(self.spec)
        if self.request.untie:
            content["tie_word_embeddings"] = False
        return content


def plan_conversion(request: ConversionRequest, statistics: LayerTensors | None = None) -> Conversion:
    """Plans a conversion from configs and file headers alone.

    Args:
        request: What is asked for.
        statistics: By block, for methods that need some; and the router's rows, where somebody gives them.

    Raises:
        ModelError: The dense checkpoint or the format cannot be had.
        ConfigError: The method does not fit.
    """
    moe = plan_moe(request, statistics)
    model = moe.model
    assert model is not None, "a conversion reads the dense files"
    exporter, unsupported_reasons = pick_exporter(request, moe.spec)
    kept = list(_kept(moe, model, request.untie))
    first = model.files[0]
    kept_specs = [
        TensorSpec(work.name, first.tensors[stored].spec.dtype, model.names.state[same])
        for work, same, stored in kept
    ]
    placement = Placement(moe.spec, exporter, kept_specs, request.dtype, request.layout)
    work = (
        *(work for work, _, _ in kept),
        *(RouterWork(layer) for layer in moe.plans),
        *(ConstantWork(name) for name in placement.constants),
        *expert_work(moe.ffns, model),
    )
    return Conversion(
        request=request,
        names=model.names,
        files=model.files,
        spec=moe.spec,
        plans=moe.plans,
        routers=moe.routers,
        exporter=exporter,
        unsupported_reasons=unsupported_reasons,
        placement=placement,
        work=work,
        skipped=model.skipped,
        claims_exact=moe.claims_exact,
    )


def _kept(moe: MoEPlan, model: StoredModel, untie: bool) -> Iterator[tuple[KeptWork, str, str]]:
    """Lists the tensors to carry over: the work, the name in the model, the name in the first files."""
    taken = tuple(f"{ffn.site}." for ffn in moe.ffns)
    wanted = {name: name for name in model.names.state if not name.startswith(taken)}
    if untie:
        wanted |= model.names.tied
    for name, same in wanted.items():
        sources = tuple((source, model.stored[source][same]) for source in moe.method.averaged)
        yield KeptWork(name, sources), same, model.stored[0][same]


def pick_exporter(request: ConversionRequest, spec: ModelSpec) -> tuple[Exporter, Sequence[str]]:
    """Returns the format that is asked for, and why native ones were not chosen.

    Raises:
        ConfigError: The format does not hold the model, or not in this layout.
    """
    if request.target == "auto":
        exporter, unsupported_reasons = choose_exporter(spec)
    else:
        exporter, unsupported_reasons = exporters()[request.target], ()
        if reason := exporter.unsupported_reason(spec):
            raise ConfigError.one(
                "--target", request.target, reason, "Use --target auto, or change the method."
            )
    if request.layout not in exporter.layouts:
        rule = f"the format {exporter.name} is written {' or '.join(exporter.layouts)}"
        raise ConfigError.one("--layout", request.layout, rule, f"Use --layout {exporter.layouts[0]}.")
    return exporter, unsupported_reasons


def expert_work(ffns: Sequence[FFNNames], model: StoredModel) -> Iterator[ExpertWork]:
    """Lists every matrix and bias of the dense networks that become MoE layers, of every checkpoint."""
    for ffn in ffns:
        for source in range(len(model.files)):
            for bias, where in ((False, ffn.matrices), (True, ffn.biases)):
                for matrix, name in where.items():
                    yield ExpertWork(ffn, source, matrix, bias, model.where(source, name))
