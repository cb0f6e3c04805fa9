"""The main job: a dense checkpoint becomes a mixture of experts, trains, and is compared and exported."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from moe.dispatch.local import LocalDispatcher
from moe.errors import Mistake
from moe.routers import Router, router_class
from moe.upcycle import UpcycleMethod, upcycle_methods
from moe.upcycle.check import TOLERANCES
from recipes.accounts import account, find_peaks, put_training, step_costs
from recipes.bandwidth import Peaks
from recipes.calibration.gather import Calibration, LayerTensors, kept_statistics
from recipes.checkpoint import checkpoint_bytes, find_checkpoint, require_space, verify_checkpoint
from recipes.costs import measure_costs, scheduled_costs, step_model
from recipes.data.build import TrainData
from recipes.data.chat_template import carry_template
from recipes.data.sources import resolve
from recipes.embedded import embedded_dense, shared_data, train_embedded, vocab_size_of
from recipes.hosts.attention import describe_attention, summarise_attention, swap_attention, upcycle_attention
from recipes.hosts.drift import describe_surgery, summarise_surgery
from recipes.hosts.export import export, verify_export
from recipes.hosts.exporters import choose_exporter
from recipes.hosts.huggingface import HuggingFaceHost, Surgery, load_host, swap, upcycle
from recipes.hosts.spec import describe_host
from recipes.identity import refuse_changes
from recipes.jobs.base import Job, Session
from recipes.loop import Leg, LegResult, validation_loss
from recipes.packed_attention import fit_attention
from recipes.preflight import check_run
from recipes.prompts.rows import with_prompt_rows
from recipes.results import Results, leg_label
from recipes.run_file import read_run_file
from recipes.schema import RunConfig
from recipes.sparsify import describe_phases, host_schedule, summarise_phases

# Real tokens of the step-0 gate and of the comparison after export.
_CHECK_SAMPLES = 8
_CHECK_LENGTH = 512


class UpcycleJob(Job):
    """Dense in; mixture, baseline, comparison, export and report out.

    Attributes:
        takes_attention: Whether all of its mixtures take what ``attention`` says.
    """

    name = "upcycle"
    takes_attention: ClassVar[bool] = True

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
        return mistakes

    def kinds(self, config: RunConfig) -> list[Callable[..., TrainedLeg]]:
        """The legs of a run, in order."""
        return [MoELeg, CPTLeg] if config.trains_cpt else [MoELeg]

    def run(self, session: Session) -> bool:
        """Trains what is to be trained, leg by leg; a resumed run skips the legs that are finished."""
        config = session.config
        if config.dense is None:
            folder, data = embedded_dense(session)
        else:
            folder = Path(config.dense).expanduser().absolute()
            vocab_size = session.on_rank_zero(lambda: vocab_size_of(folder))
            data = shared_data(session, folder, vocab_size)
        # Before the default is trained: a resume that is refused costs nothing and leaves the run as it was.
        refuse_changes(session, folder, data)
        if config.dense is None and not train_embedded(session, folder, data):
            return False
        content = session.engine.broadcast(Results.read(session.run_dir.summary) if session.leads else None)
        results = Results(session.run_dir.summary, content, writes=session.leads)
        _describe(session, data)
        # Once for all legs, so that their utilisations compare.
        peaks = find_peaks(session)
        legs = [kind(session, folder, data, results, peaks) for kind in self.kinds(config)]
        trains = not all(leg.finished for leg in legs)
        ended = all(leg.run() for leg in legs)
        if trains:
            results.content["peaks"] = peaks.figures()
            account(session, results)
        if ended:
            session.on_rank_zero(lambda: _conclude(session, results))
        return ended


def _describe(session: Session, data: TrainData) -> None:
    train, world = session.config.train, session.engine.world_size
    tokens = train.global_batch_size * data.train.seq_len
    session.say(
        f"data: {data.train_tokens:,} tokens to train on, {data.validation_tokens:,} held out; a step takes "
        f"{tokens:,} tokens = {train.num_micro_batches(world)} micro-batches x {world} ranks x "
        f"{train.micro_size(world)} samples x {data.train.seq_len}; {train.steps} steps are "
        f"{train.steps * train.global_batch_size / data.train.samples_per_epoch:.2f} epochs"
    )


class TrainedLeg:
    """What the upcycled model and its baseline have in common."""

    name: str

    def __init__(
        self, session: Session, folder: Path, data: TrainData, results: Results, peaks: Peaks
    ) -> None:
        self.session = session
        self.peaks = peaks
        self.folder = folder
        self.data = data
        self.results = results
        self.config = session.config

    @property
    def finished(self) -> bool:
        """Whether all steps are done; a finished run goes on when it is resumed with more of them."""
        row = self.results.row(self.name)
        tokens = self.config.train.steps * self.config.train.global_batch_size * self.data.train.seq_len
        return row is not None and row["tokens"] >= tokens

    def run(self) -> bool:
        """Trains the leg, unless an earlier process has; returns whether it is finished."""
        if self.finished:
            self.session.say(f"{self.name}: finished by an earlier process of this run")
            return True
        gc.collect()
        started = time.time()
        source = self._source()
        leg = self._build(source)
        if leg is None:
            return False
        if source is not None:
            self.session.say(f"{self.name}: going on from {source}")
            leg.state |= self.session.loop.resume(leg, source)
        result = self.session.loop.run(leg)
        put_training(self.session, self.results, self.name, result.missing)
        self.results.add_time(f"{self.name}_s", time.time() - started)
        if self.session.loop.first_step_time is not None:
            seconds = self.session.loop.first_step_time - self.session.started
            self.results.content["timings"].setdefault("first_step_s", seconds)
        if result.finished:
            self._finish(leg, result)
            self.results.put_leg(
                self.name,
                leg_label(self.name),
                result.val_loss,
                result.step * leg.tokens_per_step,
                leg.costs,
                result.tokens_per_s,
            )
        self.results.write()
        return result.finished

    def _source(self) -> Path | None:
        """The checkpoint that this leg goes on from."""
        run_dir = self.session.run_dir
        if run_dir.resumed:
            found = find_checkpoint(run_dir.checkpoints(self.name))
            for path, reason in found.rejected:
                self.session.say(f"{self.name}: passing over the checkpoint {path}: {reason}")
            if found.path is not None:
                return found.path
        fork = self.session.on_rank_zero(lambda: read_run_file(run_dir.path).get("fork"))
        if self.name != "moe" or fork is None:
            return None
        verify_checkpoint(fork)
        return Path(fork)

    def _dense(self) -> HuggingFaceHost:
        """The dense model; the samples then fit its attention."""
        host = load_host(self.folder, trust_remote_code=self.config.trust_remote_code)
        self.data = fit_attention(self.data, host.model, self.session.say)
        return host

    def _build(self, source: Path | None) -> Leg | None:
        """The leg; None when the run was asked to stop before it was made."""
        raise AssertionError("a subclass builds")

    def _finish(self, leg: Leg, result: LegResult) -> None:
        """What follows the last step."""

    def _leg(self, host: HuggingFaceHost, state: dict[str, Any]) -> Leg:
        engine, peak, bandwidth = self.session.engine, self.peaks.flops, self.peaks.bandwidth
        model = step_model(host)
        costs = measure_costs(host, self.config.data.seq_len, peak.value)
        trainable = engine.prepare(host, self.config.optim)
        leg = Leg(
            name=self.name,
            title=self.name,
            train=self.config.train,
            optim=self.config.optim,
            data=self.data,
            trainable=trainable,
            costs=costs,
            scheduled_costs=scheduled_costs(host, self.config.data.seq_len, peak.value),
            step_costs=step_costs(self.session, host, model, trainable, bandwidth),
            checkpoints=self.session.run_dir.checkpoints(self.name),
            state=state,
            first_sample=self._first_sample(),
            seed=self.config.seed,
        )
        self._require_space(leg)
        self.session.say(
            f"{self.name}: {costs.total_params:,} parameters, {costs.active_params:,} active a token; "
            f"utilisation is of {peak.value / 1e9:,.0f} GFLOP/s a rank ({peak.source}: {peak.detail}) and of "
            f"{bandwidth.words()}"
        )
        for line in describe_phases(host.schedule, leg.scheduled_costs):
            self.session.say(f"{self.name}: {line}")
        return leg

    def _first_sample(self) -> int:
        """The embedded default has seen the run's first samples: training on goes on with unseen ones."""
        if self.config.dense is not None:
            return 0
        return self.config.model.steps * self.config.train.global_batch_size

    def _require_space(self, leg: Leg) -> None:
        one = checkpoint_bytes(leg.trainable.checkpoint_tensors())
        kept = (self.config.train.keep_last or 2) + 1
        export_bytes = 4 * leg.costs.total_params
        folder = self.session.run_dir.path
        self.session.on_rank_zero(
            lambda: require_space(folder, kept * one + export_bytes, f"{kept} checkpoints and the export")
        )


class MoELeg(TrainedLeg):
    """The upcycled model."""

    name = "moe"

    def _build(self, source: Path | None) -> Leg | None:
        host = self._dense()
        surgery = make_surgery(self.config)
        statistics = self._statistics(host, surgery.method, source)
        if statistics is None:
            return None
        host.schedule = host_schedule(self.config, host, surgery.method)
        if source is not None:
            # The weights come from the checkpoint: exactness was measured when the run began.
            swap(host, surgery, [host] * len(surgery.method.sources), statistics)
            if self.config.attention is not None:
                swap_attention(host, self.config.attention, self.config.seed)
            return self._leg(host, {})
        sources = [
            load_host(Path(folder).expanduser(), trust_remote_code=self.config.trust_remote_code)
            for folder in surgery.method.sources
        ]
        report = upcycle(host, surgery, self._check_tokens(), sources, statistics)
        self.session.say(describe_surgery(report))
        state = {"exactness": summarise_surgery(report)}
        if self.config.attention is not None:
            cut = upcycle_attention(host, self.config.attention, self.config.seed, self._check_tokens())
            self.session.say(describe_attention(cut))
            state["attention"] = summarise_attention(cut)
        return self._leg(host, state)

    def _statistics(
        self, host: HuggingFaceHost, method: UpcycleMethod[Any], source: Path | None
    ) -> LayerTensors | None:
        """What the method must be told of the dense model; None when the run was asked to stop meanwhile."""
        if source is not None:
            return kept_statistics(self.session, source) if method.statistics else {}
        found: LayerTensors | None = {}
        if method.statistics:
            found = Calibration(self.session, host, method, self.data).run()
        return None if found is None else with_prompt_rows(found, self.config, host)

    def _check_tokens(self) -> Tensor:
        batch = self.data.validation.batch(0, _CHECK_SAMPLES)
        return torch.from_numpy(batch[:, : min(self.data.train.seq_len, _CHECK_LENGTH)])

    def _finish(self, leg: Leg, result: LegResult) -> None:
        self.results.put("exactness", leg.state["exactness"])
        if "attention" in leg.state:
            self.results.put("attention", leg.state["attention"])
        if leg.scheduled_costs:
            self.results.put("sparsify", summarise_phases(leg.trainable.host.schedule, leg.scheduled_costs))
        self._put_dense(leg, result)
        self._export(leg)
        self._log_backend(leg)

    def _put_dense(self, leg: Leg, result: LegResult) -> None:
        """The row of the dense model that everything is compared with."""
        host = load_host(self.folder, trust_remote_code=self.config.trust_remote_code)
        costs = measure_costs(host, self.config.data.seq_len, None)
        trainable = self.session.engine.prepare(host, self.config.optim)
        loss = validation_loss(self.session.engine, trainable, self.data, self.config.train)
        self.results.put_leg("dense", leg_label("dense"), loss, 0, costs, None)

    def _log_backend(self, leg: Leg) -> None:
        _, layer = leg.trainable.host.moe_layers()[0]
        choice = layer.experts.backend_choice()
        if choice is not None:
            self.results.put("experts", {"backend": choice.backend.name, "reason": choice.reason})

    def _export(self, leg: Leg) -> None:
        session, host = self.session, leg.trainable.host
        exporter, refusals = choose_exporter(describe_host(host))
        dtype = _export_dtype(self.config, host)
        if not exporter.is_native:
            session.say(f"export: in Graft's own format, since {'; '.join(refusals)}")
        export(
            host, exporter, leg.trainable.full_tensors(), session.run_dir.export, dtype, writes=session.leads
        )
        tokens = self._check_tokens()
        logits = leg.trainable.logits(tokens)
        loosest = max((dtype, session.engine.compute_dtype), key=lambda kind: TOLERANCES[kind])
        session.on_rank_zero(lambda: carry_template(self.config.data, session.run_dir.export))
        report = session.on_rank_zero(
            lambda: verify_export(exporter, session.run_dir.export, tokens, logits, loosest)
        )
        session.say(
            f"export: {report.format} in {report.path}; reloaded, its logits differ by "
            f"{report.logits.max_diff:.2e} ({report.logits.relative:.1e} of the largest)"
        )
        self.results.put(
            "export",
            {
                "format": report.format,
                "native": report.is_native,
                "path": session.run_dir.export.name,
                "relative": report.logits.relative,
                "max_diff": report.logits.max_diff,
                "kl": report.logits.kl,
                "argmax_agreement": report.logits.argmax_agreement,
                "sample": report.sample,
            },
        )


class CPTLeg(TrainedLeg):
    """The baseline of both sparse-upcycling papers: the dense model on the same tokens."""

    name = "cpt"

    def _build(self, source: Path | None) -> Leg:
        return self._leg(self._dense(), {})


def make_surgery(config: RunConfig) -> Surgery:
    """The surgery that a config describes."""

    def make_router(model_width: int, num_experts: int) -> Router[Any]:
        return router_class(config.router.name)(config.router, model_width, num_experts)

    return Surgery(
        method=upcycle_methods()[config.upcycle.name](config.upcycle),
        make_router=make_router,
        make_dispatcher=LocalDispatcher,
        backend=config.experts.backend,
        seed=config.seed,
    )


def _export_dtype(config: RunConfig, host: HuggingFaceHost) -> torch.dtype:
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "source": host.source_dtype}
    return named[config.export.dtype]


def _conclude(session: Session, results: Results) -> None:
    """Report and table."""
    from recipes.report import build_report, results_table

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
