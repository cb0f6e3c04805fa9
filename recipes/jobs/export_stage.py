"""Exports the MoE model of a stage and checks the files: after training, and once before it.

What keeps a model from being exported is known before the first step, so that it is found there.
"""

from __future__ import annotations

import collections
import shutil
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe.errors import DiskError, ExactnessError, GraftError, ModelError
from recipes.config.sections.export_config import ExportConfig
from recipes.data.chat_template import carry_template
from recipes.jobs.export_reference import reference_logits
from recipes.models.export import Exporter, choose_exporter
from recipes.models.export.model_card import Origin, dense_name, write_card
from recipes.models.export.spec import describe_model
from recipes.models.export.write_export import ExportReport, export, verify_export
from recipes.runtime.machine_memory import collect
from recipes.upcycling.convert.folder_check import telling_rows

if TYPE_CHECKING:
    from recipes.jobs.rounding import RoundingCost
    from recipes.jobs.stage_run import StageRun
    from recipes.training.stage import Stage

_TRIED = ".export-check"
_CAME = "the mixture came in it"
# Part of a checkpoint's state: the dtype of the files that were tried.
_TRIED_AS = "export_tried"


def check_export_early(run: StageRun, stage: Stage) -> None:
    """Exports the model before it is trained to a folder that is deleted afterwards, and checks it.

    Checkpoints carry that it was done: a resumed run does it again for files of another dtype alone.

    Args:
        run: The stage's run.
        stage: The stage, before the first step of this process.

    Raises:
        ExactnessError: The files do not compute what the model does, or cannot be read.
        DiskError: The disk is full.
    """
    config = run.config.section(ExportConfig)
    if run.config.train.steps == 0:
        run.log("export: checked at the end alone, as nothing is trained before")
        return
    if not config.try_first:
        run.log("export: checked at the end alone, by export.try_first=false")
        return
    if stage.state.get(_TRIED_AS) == config.dtype:
        run.log("export: tried when the run began, not once more")
        return
    tokens_BS = telling_rows(run.inputs.folder, run.data.validation)
    folder, started = run.inputs.run_dir.path / _TRIED, time.monotonic()
    try:
        report, _ = _write_and_check(run, stage, folder, tokens_BS, trained=False)
    except (ExactnessError, ModelError) as error:
        reason = str(error).replace("what was trained", "the model before training")
        raise ExactnessError(f"tried before training, the export fails: {reason}") from None
    finally:
        if run.inputs.console.is_rank0:
            shutil.rmtree(folder, ignore_errors=True)
    stage.state[_TRIED_AS] = config.dtype
    run.log(
        f"export: tried before training as {report.format}, in {time.monotonic() - started:.1f} s; reloaded, "
        f"its logits differ by {report.logits.relative:.1e} of the largest"
    )


def export_moe(run: StageRun, stage: Stage) -> None:
    """Exports the model; the error of an export that fails is kept in the results, for the end of the run."""
    tokens_BS = telling_rows(run.inputs.folder, run.data.validation)
    try:
        report, cost = _write_and_check(run, stage, run.inputs.run_dir.export, tokens_BS, trained=True)
    except (ExactnessError, ModelError, DiskError) as error:
        run.results.put("export", {"failed": str(error)})
        run.log(f"export: FAILED, {error}. The run goes on with the rest of its results")
        return
    run.log(
        f"export: {report.format} in {report.path}; reloaded, its logits differ by "
        f"{report.logits.max_diff:.2e} ({report.logits.relative:.1e} of the largest)"
    )
    if cost is not None:
        run.log(f"export: {cost.words('export.dtype=fp32', 'validation text')}")
    run.results.put(
        "export",
        {
            "format": report.format,
            "native": report.is_native,
            "path": report.path.name,
            "relative": report.logits.relative,
            "max_diff": report.logits.max_diff,
            "kl": report.logits.kl,
            "argmax_agreement": report.logits.argmax_agreement,
            "rounding": None if cost is None else cost.row(),
            "sample": report.sample,
        },
    )


def _write_and_check(
    run: StageRun, stage: Stage, folder: Path, tokens_BS: Tensor, *, trained: bool
) -> tuple[ExportReport, RoundingCost | None]:
    """Writes the model, reads it back and compares; measures costs and samples of a trained model alone."""
    console, model = run.inputs.console, stage.train_module.skeleton
    config, heartbeat = run.config.section(ExportConfig), console.heartbeat
    exporter, unsupported_reasons = (
        (run.format, [_CAME]) if run.format else choose_exporter(describe_model(model))
    )
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "source": model.source_dtype}[config.dtype]
    if not exporter.is_native and trained:
        run.log(f"export: in Graft's own format, since {'; '.join(unsupported_reasons)}")
    run.beat("the export" if trained else "trying the export")
    _write(run, stage, exporter, folder, dtype)
    run.beat("checking the export")
    assert run.blank is not None, "the model was built"
    begun = run.begun if trained else None
    logits, cost = reference_logits(
        run.engine, run.blank(), stage.train_module, exporter, dtype, tokens_BS, begun
    )
    # The modules of the blank model hold one another, and so do those of the one that is read back.
    released = 4 * sum(parameter.numel() for parameter in model.module.parameters())
    collect(released)
    training = f"trained since, in the run {run.inputs.run_dir.name}"
    method = None if run.format else run.config.upcycle.name
    origin = Origin(dense_name(run.config.dense), method, training)
    console.on_rank_zero(lambda: carry_template(run.config.data, folder))
    console.on_rank_zero(lambda: write_card(folder, exporter, describe_model(model), origin))
    memory, sampled = config.memory_gib * 2**30, 32 if trained else 1
    trust = run.config.trust_remote_code
    given = (exporter, folder, tokens_BS, logits, memory, heartbeat)
    check = partial(verify_export, *given, sampled=sampled, trust_remote_code=trust)
    report = console.on_rank_zero(check)
    collect(released)
    return report, cost


def _write(run: StageRun, stage: Stage, exporter: Exporter, folder: Path, dtype: torch.dtype) -> None:
    console, model = run.inputs.console, stage.train_module.skeleton
    tensors, failed = stage.train_module.full_tensors(), None
    try:
        export(
            model,
            exporter,
            tensors,
            folder,
            dtype,
            writes=console.is_rank0,
            heartbeat=console.heartbeat,
        )
    except GraftError as error:
        # The other ranks gather to the end.
        collections.deque(tensors, maxlen=0)
        failed = error
    console.on_rank_zero(partial(_raise, failed))


def _raise(error: GraftError | None) -> None:
    if error is not None:
        raise error
