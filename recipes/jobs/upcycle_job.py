"""Main job: upcycles a dense checkpoint to an MoE model, trains it, compares it and exports it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import ClassVar

from moe.errors import ExactnessError, Mistake
from recipes.config.schema import RunConfig
from recipes.config.sections.compare_config import CompareConfig
from recipes.data.build_data import TrainData
from recipes.data.sources import resolve
from recipes.engines.console import RankConsole
from recipes.jobs.accounts import account, find_peaks
from recipes.jobs.base import Job, Session
from recipes.jobs.blend_use import foresee_blend
from recipes.jobs.default_model import default_dense, shared_data, train_default
from recipes.jobs.expert_rules import refuse_low_rank
from recipes.jobs.identity import data_parts, identity, refuse_changes
from recipes.jobs.moe_stage import MOE
from recipes.jobs.preflight import check_run
from recipes.jobs.run_dir import RunDir
from recipes.jobs.stage_run import CPT, StageInputs, StageRun, first_sample
from recipes.models.hf.config_file import vocabulary_size
from recipes.runtime.machine_memory import is_out_of_memory
from recipes.tracking.results import Results


class UpcycleJob(Job):
    """Job from a dense checkpoint to an MoE model, its baseline, comparison, export and report.

    Attributes:
        takes_attention: True when all of its MoE models follow ``attention``.
        needs_weights: Reason, as a clause, why all weights of its MoE models must train; None where low-rank
            factors do as well.
    """

    name = "upcycle"
    sections = (CompareConfig,)
    takes_attention: ClassVar[bool] = True
    needs_weights: ClassVar[str | None] = None

    def check(self, config: RunConfig, world_size: int) -> list[Mistake]:
        """Checks all of `check_run`, and that the default model can be trained on the data."""
        mistakes = check_run(config, world_size)
        for own in config.data.sources() if not mistakes and config.dense is None else ():
            if resolve(own).kind == "indexed":
                rule = "there is no text in it to train the default model's tokenizer on"
                remedy = "Set dense to the checkpoint whose tokenizer made these files."
                mistakes.append(Mistake("data.path", own.path, rule, remedy))
        if config.attention is not None and not self.takes_attention:
            rule = f"the job {self.name} does not make experts of attention"
            mistakes.append(Mistake("attention", config.attention.name, rule, "Set attention=none."))
        if self.needs_weights is not None:
            mistakes += refuse_low_rank(config, self.needs_weights)
        return mistakes

    def stages(self, inputs: StageInputs) -> list[StageRun]:
        """Returns the stages of a run, in order."""
        config = inputs.config
        parts = [MOE, CPT] if config.section(CompareConfig).trains_cpt(config.dense) else [MOE]
        return [StageRun(inputs, own) for own in parts]

    def planned_steps(self, config: RunConfig) -> dict[str, int]:
        """Returns the steps of each stage, in order, for the time that a run has left; empty if unknown."""
        if CompareConfig not in self.sections:
            return {}
        names = [MOE.name, CPT.name] if config.section(CompareConfig).trains_cpt(config.dense) else [MOE.name]
        return dict.fromkeys(names, config.train.steps)

    def run(self, session: Session) -> bool:
        """Trains stage by stage; a resumed run skips the stages that are finished."""
        config, console, run_dir, loop = session.config, session.console, session.run_dir, session.loop
        console.heartbeat.beat("reading the data")
        loop.planned = self.planned_steps(config)
        if config.dense is None:
            folder, data = default_dense(config, console)
        else:
            folder = Path(config.dense).expanduser().absolute()
            trust = config.trust_remote_code
            vocab_size = console.on_rank_zero(lambda: vocabulary_size(folder, trust_remote_code=trust))
            data = shared_data(config, console, folder, vocab_size)
        # Before the default is trained: a resume that is refused costs nothing and leaves the run as it was.
        wanted = identity(config, folder, data, self.identity(config))
        parts = partial(data_parts, config, folder)
        changed = console.on_rank_zero(lambda: refuse_changes(run_dir, wanted, session.values, parts()))
        if changed:
            console.log(f"run: going on with other options than it began with: {changed}")
        last = first_sample(config) + max(loop.planned.values(), default=config.train.steps) * (
            config.train.global_batch_size
        )
        for line in foresee_blend(data, last):
            console.log(line)
        if config.dense is None and not train_default(config, console, loop, folder, data):
            return False
        content = session.engine.broadcast(Results.read(run_dir.summary) if console.is_rank0 else None)
        results = Results(run_dir.summary, content, writes=console.is_rank0)
        _describe(config, console, data)
        console.heartbeat.beat("measuring the device")
        # Once for all stages, so that their utilisations compare.
        peaks = find_peaks(session.engine, loop.meters)
        stages = self.stages(
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
