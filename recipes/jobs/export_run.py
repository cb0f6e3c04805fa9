"""Exports a run's checkpoint tensor by tensor, without building the model."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from yaml import YAMLError

from moe.errors import ConfigError
from moe.experts.lora import merged
from recipes.checkpoint import find_checkpoint, require_space, verify_checkpoint
from recipes.checkpoint.reader import CheckpointTensors, open_checkpoint
from recipes.config.schema import RunConfig, parse_config
from recipes.jobs.run_dir import RunDir
from recipes.models.export import Exporter
from recipes.models.export.base import Layout
from recipes.models.export.output_folder import output_folder, refuse_existing
from recipes.models.export.placement import Placement
from recipes.models.export.spec import ModelSpec
from recipes.models.export.write_export import dtype_keys, write_companions, write_live
from recipes.models.hf.config_file import first_line, read_config
from recipes.models.hf.state_dict_map import StateDictMap
from recipes.models.lora_model import Factors, factors_of, is_factor
from recipes.models.safetensors.tensor_files import TensorFiles
from recipes.runtime.atomic import atomic_write_json
from recipes.runtime.run_file import read_run_file
from recipes.runtime.safetensors_codec import TensorSpec
from recipes.upcycling.calibration.gather import read_statistics
from recipes.upcycling.calibration.statistics_files import CalibrationFolder
from recipes.upcycling.convert.conversion import RECORD
from recipes.upcycling.convert.conversion_plan import ConversionRequest, plan_conversion
from recipes.upcycling.convert.dense_stage import MODEL_PREFIX, dense_dtype, write_dense


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
    """

    path: Path
    format: str
    exact_in: list[str]
    checkpoint: Path
    step: int
    total_bytes: int


def export_run(request: ExportRequest, out: Path) -> Exported:
    """Writes the model of a run's checkpoint.

    Raises:
        ConfigError: The folder is no run, has no such checkpoint, or the output exists.
        CheckpointError: The checkpoint is damaged.
    """
    refuse_existing(out, "--out")
    config, dense = _read_run(request.run)
    if request.stage == "cpt":
        return _export_dense(request, dense, out, config.trust_remote_code)
    if config.attention is not None:
        rule = "its key-value heads are experts, which only the run itself exports"
        raise ConfigError.one("RUN", str(request.run), rule, "Take its hf/ folder.")
    checkpoint = _checkpoint(request)
    verify_checkpoint(checkpoint, run=read_run_file(request.run).get("run_id"))
    statistics = read_statistics(CalibrationFolder.of_run(request.run))
    conversion = plan_conversion(
        ConversionRequest(
            dense=dense,
            method=config.upcycle,
            router=config.router,
            seed=config.seed,
            target=request.target,
            layout=request.layout,
            trust_remote_code=config.trust_remote_code,
        ),
        None if statistics is None else statistics.by_layer(),
    )
    with open_checkpoint(checkpoint) as tensors:
        dtype = request.dtype or conversion.main_dtype
        merging = Merging(tensors, factors_of(conversion.spec, config.experts.lora))
        total = _write(merging, conversion.spec, conversion.exporter, request.layout, dtype, dense, out)
        step = tensors.step
    exact_in = conversion.exporter.exact_in(conversion.spec)
    return Exported(out, conversion.exporter.name, exact_in, checkpoint, step, total)


def _export_dense(request: ExportRequest, dense: Path, out: Path, trust: bool) -> Exported:
    checkpoint = _checkpoint(request)
    verify_checkpoint(checkpoint, run=read_run_file(request.run).get("run_id"))
    with open_checkpoint(checkpoint) as tensors:
        dtype = request.dtype or dense_dtype(dense)
        total = write_dense(tensors, dense, dtype, out, trust_remote_code=trust)
        step = tensors.step
    family = read_config(out)["model_type"]
    return Exported(out, family, ["transformers"], checkpoint, step, total)


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
    return config, Path(known["dense"])


def _checkpoint(request: ExportRequest) -> Path:
    folder = RunDir(request.run).checkpoints(request.stage)
    if request.step is None:
        found = find_checkpoint(folder, run=read_run_file(request.run).get("run_id"))
        for line in found.lines():
            print(line, file=sys.stderr, flush=True)
        if found.path is None:
            rule = f"it has no complete checkpoint of {request.stage}"
            remedy = "Resume the run." if request.stage == "moe" else "Run it with compare.cpt=true."
            raise ConfigError.one("run", str(request.run), rule, remedy)
        return found.path
    path = folder / f"step-{request.step:08d}"
    if not path.is_dir():
        there = ", ".join(sorted(p.name for p in folder.glob("step-*"))) or "none"
        raise ConfigError.one("--step", request.step, f"{folder} holds {there}", "Choose one of these.")
    return path


@dataclass(frozen=True)
class Merging:
    """Model in a checkpoint, whose low-rank factors are merged into their weights as these are read.

    Attributes:
        tensors: Tensors of the checkpoint.
        factors: Low-rank factors by the names of their weights.
    """

    tensors: CheckpointTensors
    factors: Mapping[str, Factors]

    def names(self) -> list[str]:
        """Returns the names of the model's tensors, without the factors."""
        return [name for name in self.tensors.names(MODEL_PREFIX) if not is_factor(name)]

    def read(self, name: str) -> Tensor:
        """Reads a tensor of the model."""
        tensor = self.tensors.read(MODEL_PREFIX + name)
        if name not in self.factors:
            return tensor
        pair = self.factors[name]
        a_ErI, b_EOr = (self.tensors.read(MODEL_PREFIX + part) for part in (pair.a, pair.b))
        return merged(tensor, a_ErI, b_EOr, pair.scale)


def _write(
    merging: Merging,
    spec: ModelSpec,
    exporter: Exporter,
    layout: Layout,
    dtype: torch.dtype,
    dense: Path,
    out: Path,
) -> int:
    live, names, tensors = StateDictMap(spec), merging.names(), merging.tensors
    kept = [
        TensorSpec(name, tensors.dtype(MODEL_PREFIX + name), tensors.shape(MODEL_PREFIX + name))
        for name in names
        if live.pieces(name) is None and live.router(name) is None
    ]
    placement = Placement(spec, exporter, kept, dtype, layout)
    total = sum(tensor.num_bytes for tensor in placement.specs)
    with output_folder(out) as temporary:
        require_space(out, total, "the model")
        files = TensorFiles(temporary, placement.specs)
        for name in names:
            write_live(files, name, merging.read(name), live, placement)
        for name, constant in placement.constants.items():
            files.write(name, constant)
        files.finish()
        config: dict[str, Any] = exporter.config(spec) | dtype_keys(dtype)
        write_companions(temporary, config, dense)
        record = {"step": tensors.step, "format": exporter.name, "exact_in": exporter.exact_in(spec)}
        router = asdict(spec.moe_blocks[0].router.config)
        atomic_write_json(temporary / RECORD, record | {"router": router})
    return total
