"""The stages of the job `two_stage`: the second goes on with the weights of the first, on data of its own."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

from moe.errors import CheckpointError
from recipes.checkpoint import find_checkpoint, load_checkpoint, local_memory
from recipes.config.schema import RunConfig
from recipes.data.build_data import TrainData
from recipes.jobs.default_model import shared_data
from recipes.jobs.identity import data_changes, data_parts
from recipes.jobs.moe_stage import build_moe, report_moe
from recipes.jobs.stage2_options import FIRST, stage2_config
from recipes.jobs.stage_run import Built, StageInputs, StageParts, StageRun
from recipes.models.hf.config_file import vocabulary_size
from recipes.runtime.run_file import read_run_file, write_run_file
from recipes.training.training_loop import Stage, StageResult, validation_loss


def first_stage(inputs: StageInputs) -> StageRun:
    """Returns the stage that upcycles and trains; nothing is exported yet."""

    def report(run: StageRun, stage: Stage, result: StageResult) -> None:
        run.results.put("exactness", stage.state["exactness"])
        _put_stage(run, 1, result, result.step * stage.tokens_per_step)

    return StageRun(inputs, StageParts(FIRST, _build, report))


def second_stage(inputs: StageInputs) -> StageRun:
    """Returns the stage that goes on with the first's weights, on data of its own."""
    config, console = stage2_config(inputs.config), inputs.console
    console.heartbeat.beat("reading the data of stage 2")
    console.log(f"stage 2: {config.data.path}")
    trust = config.trust_remote_code
    vocab_size = console.on_rank_zero(lambda: vocabulary_size(inputs.folder, trust_remote_code=trust))
    data = shared_data(config, console, inputs.folder, vocab_size)
    console.on_rank_zero(lambda: _refuse_other_data(inputs, config, data))
    train = inputs.config.train
    parts = StageParts(
        "moe",
        partial(_build_second, first_steps=train.steps),
        partial(_report_second, first_data=inputs.data),
        label="MoE after stage 2",
        first_sample=0,  # nothing has been trained on this data
        earlier_tokens=train.steps * train.global_batch_size * inputs.data.train.seq_len,
    )
    return StageRun(dataclasses.replace(inputs, config=config, data=data), parts)


def _build(run: StageRun, source: Path | None) -> Built | None:
    """Builds the MoE model; the statistics that its experts were planned by are the run's."""
    if source is None:
        return build_moe(run, None)
    return build_moe(run, source, run.inputs.run_dir.checkpoints("moe") / source.name)


def _build_second(run: StageRun, source: Path | None, *, first_steps: int) -> Built | None:
    if source is not None:
        return _build(run, source)
    begun = _end_of_stage1(run, first_steps)
    built = _build(run, begun)
    assert built is not None, "nothing is calibrated, so that nothing can be stopped"

    def begin(stage: Stage) -> None:
        tensors = stage.train_module.checkpoint_tensors()
        loaded = load_checkpoint(begun, tensors, checksums=False)
        for name, tensor in tensors.items():
            if name.startswith("optim."):
                for memory in local_memory(tensor):
                    memory.zero_()  # as before an optimizer's first step
        stage.state |= {key: loaded.state[key] for key in ("exactness", "attention") if key in loaded.state}
        run.log(f"stage 2: begins with the weights of {begun}")

    return dataclasses.replace(built, begin=begin)


def _end_of_stage1(run: StageRun, first_steps: int) -> Path:
    folder = run.inputs.run_dir.checkpoints(FIRST)
    found = find_checkpoint(folder, run=run.inputs.run_dir.run_id)
    for line in found.lines():
        run.log(f"{FIRST}: {line}")
    if found.path is None or int(found.path.name.removeprefix("step-")) != first_steps:
        rule = "the last checkpoint of the first stage is missing, and the second begins with it"
        raise CheckpointError.one("resume", str(folder), rule, "Restore it, or start a new run.")
    return found.path


def _report_second(run: StageRun, stage: Stage, result: StageResult, *, first_data: TrainData) -> None:
    heartbeat = run.inputs.console.heartbeat
    again = validation_loss(run.engine, stage.train_module, first_data, run.config.train, heartbeat)
    _put_stage(run, 2, result, result.step * stage.tokens_per_step, val_loss_stage1=again)
    ended = run.results.content["stages"][0]["val_loss"]
    run.log(f"stage 1: validation loss on its own data {ended:.4f} at its end, {again:.4f} after stage 2")
    before = run.results.row(FIRST)
    assert before is not None, "the second stage comes after the first"
    # Beside the others, which are validated on the second stage's data.
    before["val_loss"] = result.first_val_loss
    report_moe(run, stage, result)


def _put_stage(run: StageRun, number: int, result: StageResult, tokens: int, **more: Any) -> None:
    """Writes the section of a stage in place of that of an earlier process."""
    row = {
        "stage": number,
        "data": run.config.data.path or [each.path for each in run.config.data.blend] or None,
        "steps": result.step,
        "tokens": tokens,
        "lr": run.config.optim.lr,
        "val_loss_before": result.first_val_loss,
        "val_loss": result.val_loss,
    }
    others = [old for old in run.results.content.get("stages", []) if old["stage"] != number]
    run.results.put("stages", sorted([*others, row | more], key=lambda old: old["stage"]))


def _refuse_other_data(inputs: StageInputs, config: RunConfig, data: TrainData) -> None:
    """Refuses other data for the second stage when a run goes on, also while it is in the first."""
    run_dir, parts = inputs.run_dir.path, data_parts(config, inputs.folder)
    record = read_run_file(run_dir)
    if record.get("stage2_data") not in (None, data.fingerprint):
        rule = "the run began with other data for its second stage: "
        rule += data_changes(record.get("stage2_parts"), parts)
        remedy = "Set it back to go on, or start a new run with resume=none."
        raise CheckpointError.one("stage2.path", config.data.path, rule, remedy)
    write_run_file(run_dir, stage2_data=data.fingerprint, stage2_parts=parts)
