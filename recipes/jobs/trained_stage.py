"""What is trained in a run: a model and its baseline, each a leg."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

from recipes.checkpoint import checkpoint_bytes, find_checkpoint, require_space, verify_checkpoint
from recipes.data.build_data import TrainData
from recipes.data.chat_samples import ChatSamples
from recipes.jobs.accounts import put_training, step_costs
from recipes.jobs.base import Session
from recipes.jobs.top_k_schedules import describe_phases
from recipes.models.hf.deferred_init import LaterWeights
from recipes.models.hf.hf_model import HuggingFaceHost
from recipes.models.hf.packed_attention import fit_attention
from recipes.runtime.run_file import read_run_file
from recipes.tracking.bandwidth import Peaks
from recipes.tracking.results import Results, leg_label
from recipes.training.model_costs import measure_costs, scheduled_costs, step_model
from recipes.training.stage import Leg, LegResult
from recipes.upcycling.convert.moe_plan import open_dense
from recipes.upcycling.sharded.sharded_models import dense_host


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
        self._mark("looking for a checkpoint")
        source = self._source()
        self._mark("making the model")
        leg = self._build(source)
        if leg is None:
            return False
        if source is not None:
            self.session.say(f"{self.name}: going on from {source}")
            self._mark("loading the checkpoint")
            leg.state |= self.session.loop.resume(leg, source)
        result = self.session.loop.run(leg)
        self._mark("its results")
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

    def _mark(self, where: str) -> None:
        """Tells the watch what comes next."""
        self.session.watch.mark(f"{self.name}: {where}")

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
        """The dense model, without memory: the engine then has each rank read its own part."""
        trust = self.config.trust_remote_code
        return dense_host(open_dense(self.folder, trust_remote_code=trust), trust_remote_code=trust)

    def _fit_attention(self) -> None:
        """Conversations then fit the dense model's attention, which is tried out; text stays as it is."""
        if not isinstance(self.data.train, ChatSamples):
            return
        host = self._dense()
        self.session.engine.hold(host)
        self.data = fit_attention(self.data, host.model, self.session.say)
        del host
        gc.collect()

    def _build(self, source: Path | None) -> Leg | None:
        """The leg; None when the run was asked to stop before it was made."""
        raise AssertionError("a subclass builds")

    def _finish(self, leg: Leg, result: LegResult) -> None:
        """What follows the last step."""

    def _leg(self, host: HuggingFaceHost, state: dict[str, Any]) -> Leg:
        engine, peak, bandwidth = self.session.engine, self.peaks.flops, self.peaks.bandwidth
        model = step_model(host)
        costs = measure_costs(host, self.config.data.seq_len, peak.value)
        later = scheduled_costs(host, self.config.data.seq_len, peak.value)
        trainable = engine.prepare(host, self.config.optim)
        leg = Leg(
            name=self.name,
            title=self.name,
            train=self.config.train,
            optim=self.config.optim,
            data=self.data,
            trainable=trainable,
            costs=costs,
            scheduled_costs=later,
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
        kept = (self.config.train.keep_last or 2) + 1 + self.config.train.keep_best
        export_bytes = 4 * leg.costs.total_params
        folder = self.session.run_dir.path
        self.session.on_rank_zero(
            lambda: require_space(folder, kept * one + export_bytes, f"{kept} checkpoints and the export")
        )


class CPTLeg(TrainedLeg):
    """The baseline of both sparse-upcycling papers: the dense model on the same tokens."""

    name = "cpt"

    def _build(self, source: Path | None) -> Leg:
        self._fit_attention()
        host = self._dense()
        if source is not None:
            host.weights = LaterWeights()
        return self._leg(host, {})
