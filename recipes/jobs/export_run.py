"""Exports a run's checkpoint tensor by tensor, without building the model."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from moe.errors import ConfigError, Mistake
from recipes.checkpoint import find_checkpoint, require_space, verify_checkpoint
from recipes.checkpoint.reader import CheckpointTensors, open_checkpoint
from recipes.config.schema import RunConfig, parse_config
from recipes.config.sections.prompts_config import PromptsConfig
from recipes.jobs.continue_job import ContinueJob
from recipes.jobs.continue_stage import of_mixture, open_tuned
from recipes.jobs.export_check import CheckedModel, CheckpointUnread, ExportCheck, check_export
from recipes.jobs.identity import check_config_file
from recipes.jobs.merging import Merging
from recipes.jobs.rounding import MixtureStart, StepZero, rounded, written_dtypes
from recipes.jobs.run_dir import RunDir
from recipes.jobs.top_k_schedules import schedule_of
from recipes.models.export import Exporter
from recipes.models.export.base import Layout
from recipes.models.export.model_card import Origin, dense_name, write_card
from recipes.models.export.output_folder import output_folder, refuse_existing
from recipes.models.export.placement import Placement
from recipes.models.export.read_back import NativeUnread, ReadBack, Unread
from recipes.models.export.spec import ModelSpec
from recipes.models.export.write_export import write_companions, write_live
from recipes.models.hf.config_file import first_line, read_config
from recipes.models.hf.deferred_init import CheckpointWeights, deferred_model
from recipes.models.hf.ffn_names import read_names
from recipes.models.hf.hf_model import HFModel, source_dtype
from recipes.models.hf.state_dict_map import StateDictMap
from recipes.models.lora_model import factors_of
from recipes.models.safetensors.tensor_files import TensorFiles
from recipes.runtime.atomic import atomic_write_json
from recipes.runtime.run_file import read_run_file
from recipes.runtime.safetensors_codec import TensorSpec
from recipes.upcycling.calibration.gather import read_statistics
from recipes.upcycling.calibration.statistics_files import CalibrationFolder
from recipes.upcycling.convert.conversion import RECORD
from recipes.upcycling.convert.conversion_plan import ConversionRequest, pick_exporter
from recipes.upcycling.convert.dense_stage import write_dense
from recipes.upcycling.convert.moe_plan import open_dense, plan_moe, request_of
from recipes.upcycling.sharded.mixture_model import mixture_model
from recipes.upcycling.sharded.sharded_models import moe_model


@dataclass(frozen=True)
class ExportRequest:
    """Request of a user.

    Attributes:
        run: The run's directory.
        step: Step of the checkpoint; None for the newest complete one.
        dtype: Dtype of the output; None for that of the dense checkpoint.
        target: Name of a format; ``auto`` for the best that holds it exactly.
        layout: Layout of the experts' tensors.
        stage: ``moe``, or ``cpt`` for the dense model that was trained on the same tokens.
    """

    run: Path
    step: int | None = None
    dtype: torch.dtype | None = None
    target: str = "auto"
    layout: Layout = "per_expert"
    stage: Literal["moe", "cpt"] = "moe"


@dataclass(frozen=True)
class Exported:
    """Export that was written.

    Attributes:
        path: The folder.
        format: Its format.
        exact_in: Programs that compute exactly this function.
        checkpoint: Checkpoint of the weights.
        step: Its step.
        total_bytes: Bytes of the tensors.
        check: How the files compare with the checkpoint.
    """

    path: Path
    format: str
    exact_in: list[str]
    checkpoint: Path
    step: int
    total_bytes: int
    check: ExportCheck


def export_run(request: ExportRequest, out: Path) -> Exported:
    """Writes the model of a run's checkpoint, and checks the files before they get their name.

    Raises:
        ConfigError: The folder is no run, has no such checkpoint, or the output exists.
        CheckpointError: The checkpoint is damaged.
        ExactnessError: The files do not compute what the checkpoint does.
    """
    refuse_existing(out, "--out")
    write = _export_dense if request.stage == "cpt" else _export_moe
    with _opened(request) as (config, dense, tensors):
        return write(request, config, dense, tensors, out)


@contextmanager
def _opened(request: ExportRequest) -> Iterator[tuple[RunConfig, Path, CheckpointTensors]]:
    """Yields the config of a run, its dense model, and a checkpoint that was verified."""
    config, dense = _read_run(request.run)
    if config.attention is not None and request.stage == "moe":
        rule = "its key-value heads are experts, which only the run itself exports"
        raise ConfigError.one("RUN", str(request.run), rule, "Take its hf/ folder.")
    checkpoint = _checkpoint(request)
    verify_checkpoint(checkpoint, run=read_run_file(request.run).get("run_id"))
    with open_checkpoint(checkpoint) as tensors:
        yield config, dense, tensors


@contextmanager
def trained_model(request: ExportRequest) -> Iterator[HFModel]:
    """Yields the mixture of a run's checkpoint as the trainer has it: with Graft's own layers and routers.

    Its weights have the values that an export has, which may be rounded, in fp32. They are read when it first
    runs.

    Raises:
        ConfigError: The folder is no run, or has no such checkpoint.
        CheckpointError: The checkpoint is damaged.
    """
    with _opened(request) as (config, dense, tensors):
        made = _planned(request, config, dense, tensors)
        model = made.source.blank()
        unread = CheckpointUnread(model, made.source, lambda each: rounded(each, made.source.dtypes))
        ReadBack(unread, math.inf)
        model.module.eval()
        yield model


@dataclass(frozen=True)
class _Moe:
    """Export of a mixture, planned."""

    spec: ModelSpec
    exporter: Exporter
    dtype: torch.dtype
    merging: Merging
    kept: list[TensorSpec]
    source: CheckedModel
    layout: Layout

    @classmethod
    def of(cls, request: ExportRequest, config: RunConfig, dense: Path, tensors: CheckpointTensors) -> _Moe:
        """Plans the export of a checkpoint."""
        statistics = read_statistics(CalibrationFolder.of_run(request.run))
        known = None if statistics is None else statistics.by_layer()
        wanted = ConversionRequest(
            **vars(request_of(config, dense)), target=request.target, layout=request.layout
        )
        # The weights of the dense model are in the checkpoint: it may be gone but for its config.
        plan = plan_moe(wanted, known, reads=False)
        exporter, _ = pick_exporter(wanted, plan.spec)
        dtype = request.dtype or source_dtype(plan.names.config)
        merging = Merging(tensors, factors_of(plan.spec, config.experts.lora))
        kept = merging.kept(StateDictMap(plan.spec))

        def blank() -> HFModel:
            model = moe_model(plan, config.experts.backend, CheckpointWeights())
            model.schedule, model.context.step = schedule_of(config, list(plan.plans)), tensors.step
            return model

        def begun() -> StepZero:
            again = plan_moe(wanted, known)
            assert again.model is not None, again
            return StepZero(again.model, again, routers=config.section(PromptsConfig).path is None)

        dtypes = written_dtypes(plan.spec, kept, exporter, dtype)
        source = CheckedModel(blank, merging.names(), merging.read, dtypes, begun)
        return cls(plan.spec, exporter, dtype, merging, kept, source, request.layout)

    @classmethod
    def continued(
        cls, request: ExportRequest, config: RunConfig, folder: Path, tensors: CheckpointTensors
    ) -> _Moe:
        """Plans the export of a mixture that was trained on, in the format that it was read from."""
        mixture = open_tuned(folder, config)
        spec, exporter = mixture.spec, mixture.format
        asked = {"--target": request.target} if request.target != "auto" else {}
        if request.layout == "fused" and request.layout not in exporter.layouts:
            asked |= {"--layout": request.layout}
        rule = "a mixture that was trained on is written back in its own format and layout"
        if asked:
            raise ConfigError([Mistake(flag, value, rule, "Leave it out.") for flag, value in asked.items()])
        dtype = request.dtype or exporter.dtype
        merging = Merging(tensors, factors_of(spec, config.experts.lora))
        kept = merging.kept(StateDictMap(spec))

        def blank() -> HFModel:
            model = mixture_model(mixture, config.experts.backend, reads=False)
            model.context.step = tensors.step
            return model

        dtypes = written_dtypes(spec, kept, exporter, dtype)
        begun = partial(MixtureStart, mixture)
        source = CheckedModel(blank, merging.names(), merging.read, dtypes, begun)
        return cls(spec, exporter, dtype, merging, kept, source, exporter.layouts[0])


def _planned(request: ExportRequest, config: RunConfig, dense: Path, tensors: CheckpointTensors) -> _Moe:
    plan = _Moe.continued if config.job == ContinueJob.name else _Moe.of
    return plan(request, config, dense, tensors)


def _export_moe(
    request: ExportRequest, config: RunConfig, dense: Path, tensors: CheckpointTensors, out: Path
) -> Exported:
    made = _planned(request, config, dense, tensors)
    spec, exporter = made.spec, made.exporter
    checking = _Checking(made.source, config, dense, made.dtype)
    placement = Placement(spec, exporter, made.kept, made.dtype, made.layout)
    total = _write(made.merging, spec, exporter, placement, dense, out, checking)
    exact_in = exporter.exact_in(spec, placement.layout)
    return Exported(out, exporter.name, exact_in, tensors.folder, tensors.step, total, checking.outcome())


def _export_dense(
    request: ExportRequest, config: RunConfig, dense: Path, tensors: CheckpointTensors, out: Path
) -> Exported:
    merging, trust = Merging(tensors, {}), config.trust_remote_code
    names = read_names(dense, trust_remote_code=trust)
    dtype = request.dtype or source_dtype(names.config)

    def blank() -> HFModel:
        module = deferred_model(copy.deepcopy(names.config), trust_remote_code=trust)
        return HFModel(module, dense, dtype, trust_remote_code=trust)

    dtypes = dict.fromkeys(merging.names(), dtype)

    def begun() -> StepZero:
        return StepZero(open_dense(dense, names=names))

    source = CheckedModel(blank, merging.names(), merging.read, dtypes, begun)
    checking = _Checking(source, config, dense, dtype)
    total = write_dense(
        tensors, dense, dtype, out, partial(checking.check, NativeUnread), trust_remote_code=trust
    )
    family = read_config(out)["model_type"]
    return Exported(out, family, ["transformers"], tensors.folder, tensors.step, total, checking.outcome())


def run_trusts_code(folder: Path) -> bool:
    """Tells whether a run trusts the code that its dense model brings; False of a folder that is no run.

    Raises:
        ConfigError: Its config.yaml cannot be read.
    """
    return (folder / "config.yaml").is_file() and _read_run(folder)[0].trust_remote_code


def _read_run(run: Path) -> tuple[RunConfig, Path]:
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError.one("run", str(run), "there is no config.yaml in it", "Give a run's directory.")
    try:
        values: Any = OmegaConf.to_container(OmegaConf.load(path))
        if not isinstance(values, dict):
            raise ValueError("it holds no options")
    except (OSError, ValueError, RecursionError, YAMLError, OmegaConfBaseException) as error:
        rule, remedy = f"its config.yaml cannot be read ({first_line(error)})", "Restore it."
        raise ConfigError.one("run", str(run), rule, remedy) from None
    config = parse_config(values)
    known = read_run_file(run).get("identity")
    if known is None:
        raise ConfigError.one("run", str(run), "it has no dense model yet", "Let it train to a checkpoint.")
    if config.job == ContinueJob.name:
        config = of_mixture(replace(config, dense=known["dense"]))
    if mistakes := check_config_file(config, known, path):
        raise ConfigError(mistakes)
    return config, Path(known["dense"])


def _checkpoint(request: ExportRequest) -> Path:
    folder = RunDir(request.run).checkpoints(request.stage)
    if request.step is None:
        found = find_checkpoint(folder, run=read_run_file(request.run).get("run_id"))
        for line in found.lines():
            print(line, file=sys.stderr, flush=True)
        if found.path is None:
            rule = f"it has no complete checkpoint of {request.stage}"
            remedy = "Resume the run." if request.stage == "moe" else "Upcycle with compare.cpt=true."
            raise ConfigError.one("run", str(request.run), rule, remedy)
        return found.path
    path = folder / f"step-{request.step:08d}"
    if not path.is_dir():
        there = ", ".join(sorted(p.name for p in folder.glob("step-*"))) or "none"
        raise ConfigError.one("--step", request.step, f"{folder} holds {there}", "Choose one of these.")
    return path


@dataclass
class _Checking:
    """Check of files that have no name yet.

    Attributes:
        found: Its outcome.
    """

    source: CheckedModel
    config: RunConfig
    dense: Path
    dtype: torch.dtype
    found: ExportCheck | None = None

    def check(self, read: Callable[..., Unread], folder: Path) -> None:
        """Checks the files in a folder."""
        unread = read(folder, trust_remote_code=self.config.trust_remote_code)
        self.found = check_export(self.source, unread, self.config, self.dense, self.dtype)

    def outcome(self) -> ExportCheck:
        """Returns what was found."""
        assert self.found is not None, "the files were written"
        return self.found


def _write(
    merging: Merging,
    spec: ModelSpec,
    exporter: Exporter,
    placement: Placement,
    dense: Path,
    out: Path,
    checking: _Checking,
) -> int:
    live, tensors = StateDictMap(spec), merging.tensors
    total = sum(tensor.num_bytes for tensor in placement.specs)
    with output_folder(out) as temporary:
        require_space(out, total, "the model")
        files = TensorFiles(temporary, placement.specs)
        for name in merging.names():
            write_live(files, name, merging.read(name), live, placement)
        for name, constant in placement.constants.items():
            files.write(name, constant)
        files.finish()
        config: dict[str, Any] = exporter.written_config(spec, checking.dtype)
        write_companions(temporary, config, dense, trust_remote_code=checking.config.trust_remote_code)
        exact_in = exporter.exact_in(spec, placement.layout)
        own, training = checking.config, f"trained to step {tensors.step} since"
        method = None if own.job == ContinueJob.name else own.upcycle.name
        origin = Origin(dense_name(own.dense), method, training)
        write_card(temporary, exporter, spec, origin, placement.layout)
        record = {"step": tensors.step, "format": exporter.name, "exact_in": exact_in}
        router = asdict(spec.moe_blocks[0].router.config)
        atomic_write_json(temporary / RECORD, record | {"router": router})
        checking.check(exporter.open, temporary)
    return total
