"""Runs the stages of a job, from a dense checkpoint to the report."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Protocol

from moe.errors import ExactnessError
from recipes.config.schema import RunConfig
from recipes.data.build_data import TrainData
from recipes.engines.console import RankConsole
from recipes.jobs.accounts import account, find_peaks
from recipes.jobs.base import Session
from recipes.jobs.blend_use import foresee_blend
from recipes.jobs.default_model import default_dense, shared_data, train_default
from recipes.jobs.identity import data_parts, identity, refuse_changes
from recipes.jobs.run_dir import RunDir
from recipes.jobs.stage_run import StageInputs, StageRun, first_sample
from recipes.models.hf.config_file import vocabulary_size
from recipes.runtime.machine_memory import is_out_of_memory
from recipes.tracking.results import Results


class StagedJob(Protocol):
    """Job that is a row of stages."""

    def identity(self, config: RunConfig) -> dict[str, Any]:
        """See `recipes.jobs.base.Job.identity`."""

    def planned_steps(self, config: RunConfig) -> dict[str, int]:
        """Returns the steps of each stage, in order."""

    def stages(self, inputs: StageInputs) -> list[StageRun]:
        """Returns the stages of a run, in order."""


def run_stages(job: StagedJob, session: Session) -> bool:
    """Trains stage by stage; a resumed run skips the stages that are finished.

    Args:
        job: The job, which says what its stages are.
        session: The run.

    Returns:
        False when it was asked to stop before its end.
    """
    config, console, run_dir, loop = session.config, session.console, session.run_dir, session.loop
    console.heartbeat.beat("reading the data")
    loop.planned = job.planned_steps(config)
    folder, data = _dense_and_data(config, console)
    # Before the default is trained: a resume that is refused costs nothing and leaves the run as it was.
    wanted = identity(config, folder, data, job.identity(config))
    parts = partial(data_parts, config, folder)
    changed = console.on_rank_zero(lambda: refuse_changes(run_dir, wanted, session.values, parts()))
    _foresee(session, data, changed)
    if config.dense is None and not train_default(config, console, loop, folder, data):
        return False
    content = session.engine.broadcast(Results.read(run_dir.summary) if console.is_rank0 else None)
    results = Results(run_dir.summary, content, writes=console.is_rank0)
    _describe(config, console, data)
    console.heartbeat.beat("measuring the device")
    # Once for all stages, so that their utilisations compare.
    peaks = find_peaks(session.engine, loop.meters)
    stages = job.stages(
        StageInputs(
            config=config,
            console=console,
            loop=loop,
            run_dir=run_dir,
            stop=session.stop,
            folder=folder,
            data=data,
            results=results,
            peaks=peaks,
            started=session.started,
        )
    )
    trains = not all(stage.finished for stage in stages)
    ended = all(stage.run() for stage in stages)
    console.heartbeat.beat("the report")
    if trains:
        results.content["peaks"] = peaks.figures()
        account(session, results)
    if ended:
        console.on_rank_zero(lambda: _conclude(run_dir, results))
        if failed := results.content.get("export", {}).get("failed"):
            raise ExactnessError(
                f"{failed}. All else of the run is done and kept. Export it again from its checkpoint: "
                f"python -m tools.export {run_dir.path} --out DIR --dtype fp32"
            )
    return ended


def _dense_and_data(config: RunConfig, console: RankConsole) -> tuple[Path, TrainData]:
    """Returns the folder of the model that the run begins with, and the data in its tokens."""
    if config.dense is None:
        return default_dense(config, console)
    folder, trust = Path(config.dense).expanduser().absolute(), config.trust_remote_code
    vocab_size = console.on_rank_zero(lambda: vocabulary_size(folder, trust_remote_code=trust))
    return folder, shared_data(config, console, folder, vocab_size)


def _foresee(session: Session, data: TrainData, changed: str) -> None:
    """Tells what a resume goes on with, and what a blend will take of its sources."""
    config, log = session.config, session.console.log
    if changed:
        log(f"run: going on with other options than it began with: {changed}")
    steps = max(session.loop.planned.values(), default=config.train.steps)
    for line in foresee_blend(data, first_sample(config) + steps * config.train.global_batch_size):
        log(line)


def _describe(config: RunConfig, console: RankConsole, data: TrainData) -> None:
    train, world = config.train, console.engine.data_ranks
    tokens = train.global_batch_size * data.train.seq_len
    passes = train.steps * train.global_batch_size / data.train.samples_per_epoch
    epochs = "" if data.sources else f"; {train.steps} steps are {passes:.2f} epochs"
    console.log(
        f"data: {data.train_tokens:,} tokens to train on, {data.validation_tokens:,} held out; a step takes "
        f"{tokens:,} tokens = {train.num_micro_batches(world)} micro-batches x {world} ranks x "
        f"{train.micro_size(world)} samples x {data.train.seq_len}{epochs}"
    )
    sees = "do not see" if config.data.document_mask else "see"
    console.log(f"data: the documents of a sample {sees} one another")


def _conclude(run_dir: RunDir, results: Results) -> None:
    """Builds the report and prints the table of results."""
    from recipes.tracking.report import build_report, results_table

    try:
        built = str(build_report(run_dir.path))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        # Figures never end a run that has done its work.
        built = f"not built for want of memory; python -m tools.report {run_dir.path} builds it"
    print()
    print(results_table(results.content))
    timings, memory = results.content["timings"], results.content.get("peak_memory_bytes")
    if "first_step_s" in timings and memory is not None:
        print(
            f"\ntime:   {timings['total_s']:.0f} s in all, {timings['first_step_s']:.0f} s from the command "
            f"to the end of the first step; peak memory of all ranks {memory / 2**30:.2f} GiB"
        )
    print(f"report: {built}")
    if "failed" not in results.content.get("export", {}):
        print(f"model:  {run_dir.export}")
