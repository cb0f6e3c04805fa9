"""The main job: a dense checkpoint becomes a mixture of experts, trains, and is compared and exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from moe.errors import Mistake
from recipes.config.schema import RunConfig
from recipes.config.sections.compare_config import CompareConfig
from recipes.data.build_data import TrainData
from recipes.data.sources import resolve
from recipes.jobs.accounts import account, find_peaks
from recipes.jobs.base import Job, Session
from recipes.jobs.default_model import default_dense, shared_data, train_default, vocab_size_of
from recipes.jobs.identity import refuse_changes
from recipes.jobs.lora_rules import refuse_low_rank
from recipes.jobs.moe_stage import MoEStage
from recipes.jobs.preflight import check_run
from recipes.jobs.trained_stage import CPTStage, TrainedStage
from recipes.tracking.results import Results


class UpcycleJob(Job):
    """Dense in; mixture, baseline, comparison, export and report out.

    Attributes:
        takes_attention: Whether all of its mixtures take what ``attention`` says.
        needs_weights: Why all weights of its mixtures must train, as a clause; None where factors do as well.
    """

    name = "upcycle"
    takes_attention: ClassVar[bool] = True
    needs_weights: ClassVar[str | None] = None

    def check(self, config: RunConfig, world_size: int) -> list[Mistake]:
        """Everything of `check_run`, and that the embedded default can be made from the data."""
        mistakes = check_run(config, world_size)
        if not mistakes and config.dense is None and resolve(config.data).kind == "indexed":
            rule = "there is no text in it to train the embedded default's tokenizer on"
            remedy = "Set dense to the checkpoint whose tokenizer made these files."
            mistakes.append(Mistake("data.path", config.data.path, rule, remedy))
        if config.attention is not None and not self.takes_attention:
            rule = f"the job {self.name} does not make experts of attention"
            mistakes.append(Mistake("attention", config.attention.name, rule, "Set attention=none."))
        if self.needs_weights is not None:
            mistakes += refuse_low_rank(config, self.needs_weights)
        return mistakes

    def kinds(self, config: RunConfig) -> list[Callable[..., TrainedStage]]:
        """The legs of a run, in order."""
        return [MoEStage, CPTStage] if config.section(CompareConfig).trains_cpt(config.dense) else [MoEStage]

    def run(self, session: Session) -> bool:
        """Trains what is to be trained, leg by leg; a resumed run skips the legs that are finished."""
        config = session.config
        session.heartbeat.beat("reading the data")
        if config.dense is None:
            folder, data = default_dense(session)
        else:
            folder = Path(config.dense).expanduser().absolute()
            vocab_size = session.on_rank_zero(lambda: vocab_size_of(folder))
            data = shared_data(session, folder, vocab_size)
        # Before the default is trained: a resume that is refused costs nothing and leaves the run as it was.
        refuse_changes(session, folder, data, self.identity(config))
        if config.dense is None and not train_default(session, folder, data):
            return False
        content = session.engine.broadcast(
            Results.read(session.run_dir.summary) if session.is_rank0 else None
        )
        results = Results(session.run_dir.summary, content, writes=session.is_rank0)
        _describe(session, data)
        session.heartbeat.beat("measuring the device")
        # Once for all legs, so that their utilisations compare.
        peaks = find_peaks(session)
        stages = [kind(session, folder, data, results, peaks) for kind in self.kinds(config)]
        trains = not all(stage.finished for stage in stages)
        ended = all(stage.run() for stage in stages)
        session.heartbeat.beat("the report")
        if trains:
            results.content["peaks"] = peaks.figures()
            account(session, results)
        if ended:
            session.on_rank_zero(lambda: _conclude(session, results))
        return ended


def _describe(session: Session, data: TrainData) -> None:
    train, world = session.config.train, session.engine.data_ranks
    tokens = train.global_batch_size * data.train.seq_len
    session.log(
        f"data: {data.train_tokens:,} tokens to train on, {data.validation_tokens:,} held out; a step takes "
        f"{tokens:,} tokens = {train.num_micro_batches(world)} micro-batches x {world} ranks x "
        f"{train.micro_size(world)} samples x {data.train.seq_len}; {train.steps} steps are "
        f"{train.steps * train.global_batch_size / data.train.samples_per_epoch:.2f} epochs"
    )


def _conclude(session: Session, results: Results) -> None:
    """Report and table."""
    from recipes.tracking.report import build_report, results_table

    path = build_report(session.run_dir.path)
    print()
    print(results_table(results.content))
    timings, memory = results.content["timings"], results.content.get("peak_memory_bytes")
    if "first_step_s" in timings and memory is not None:
        print(
            f"\ntime:   {timings['total_s']:.0f} s in all, {timings['first_step_s']:.0f} s from the command "
            f"to the end of the first step; peak memory of all ranks {memory / 2**30:.2f} GiB"
        )
    print(f"report: {path}\nmodel:  {session.run_dir.export}")
