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
from recipes.models.hf.deferred_init import CheckpointWeights
from recipes.models.hf.hf_model import HFModel
from recipes.models.hf.packed_attention import fit_attention
from recipes.runtime.run_file import read_run_file
from recipes.tracking.ceilings import Peaks
from recipes.tracking.results import Results, stage_label
from recipes.training.model_costs import measure_costs, scheduled_costs, step_model
from recipes.training.stage import Stage, StageResult
from recipes.upcycling.convert.moe_plan import open_dense
from recipes.upcycling.sharded.sharded_models import dense_model


class TrainedStage:
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
            self.session.log(f"{self.name}: finished by an earlier process of this run")
            return True
        gc.collect()
        started = time.time()
        self._beat("looking for a checkpoint")
        source = self._source()
        self._beat("making the model")
        stage = self._build(source)
        if stage is None:
            return False
        if source is not None:
            self.session.log(f"{self.name}: going on from {source}")
            self._beat("loading the checkpoint")
            stage.state |= self.session.loop.resume(stage, source)
        result = self.session.loop.run(stage)
        self._beat("its results")
        put_training(self.session, self.results, self.name, result.missing)
        self.results.add_time(f"{self.name}_s", time.time() - started)
        if self.session.loop.first_step_time is not None:
            seconds = self.session.loop.first_step_time - self.session.started
            self.results.content["timings"].setdefault("first_step_s", seconds)
        if result.finished:
            self._finish(stage, result)
            self.results.put_stage(
                self.name,
                stage_label(self.name),
                result.val_loss,
                result.step * stage.tokens_per_step,
                stage.costs,
                result.tokens_per_s,
            )
        self.results.write()
        return result.finished

    def _beat(self, where: str) -> None:
        """Tells the watch what comes next."""
        self.session.heartbeat.beat(f"{self.name}: {where}")

    def _source(self) -> Path | None:
        """The checkpoint that this leg goes on from."""
        run_dir = self.session.run_dir
        if run_dir.resumed:
            found = find_checkpoint(run_dir.checkpoints(self.name))
            for path, reason in found.rejected:
                self.session.log(f"{self.name}: passing over the checkpoint {path}: {reason}")
            if found.path is not None:
                return found.path
        fork = self.session.on_rank_zero(lambda: read_run_file(run_dir.path).get("fork"))
        if self.name != "moe" or fork is None:
            return None
        verify_checkpoint(fork)
        return Path(fork)

    def _dense(self) -> HFModel:
        """The dense model, without memory: the engine then has each rank read its own part."""
        trust = self.config.trust_remote_code
        return dense_model(open_dense(self.folder, trust_remote_code=trust), trust_remote_code=trust)

    def _fit_attention(self) -> None:
        """Conversations then fit the dense model's attention, which is tried out; text stays as it is."""
        if not isinstance(self.data.train, ChatSamples):
            return
        model = self._dense()
        self.session.engine.shard_for_eval(model)
        self.data = fit_attention(self.data, model.module, self.session.log)
        del model
        gc.collect()

    def _build(self, source: Path | None) -> Stage | None:
        """The leg; None when the run was asked to stop before it was made."""
        raise AssertionError("a subclass builds")

    def _finish(self, stage: Stage, result: StageResult) -> None:
        """What follows the last step."""

    def _stage(self, model: HFModel, state: dict[str, Any]) -> Stage:
        engine, peak, bandwidth = self.session.engine, self.peaks.flops, self.peaks.bandwidth
        cost_model = step_model(model)
        costs = measure_costs(model, self.config.data.seq_len, peak.value)
        later = scheduled_costs(model, self.config.data.seq_len, peak.value)
        train_module = engine.prepare(model, self.config.optim)
        stage = Stage(
            name=self.name,
            title=self.name,
            train=self.config.train,
            optim=self.config.optim,
            data=self.data,
            train_module=train_module,
            costs=costs,
            scheduled_costs=later,
            step_costs=step_costs(self.session, model, cost_model, train_module, bandwidth),
            checkpoints=self.session.run_dir.checkpoints(self.name),
            state=state,
            first_sample=self._first_sample(),
            seed=self.config.seed,
        )
        self._require_space(stage)
        self.session.log(
            f"{self.name}: {costs.total_params:,} parameters, {costs.active_params:,} active a token; "
            f"utilisation is of {peak.value / 1e9:,.0f} GFLOP/s a rank ({peak.source}: {peak.detail}) and of "
            f"{bandwidth.words()}"
        )
        for line in describe_phases(model.schedule, stage.scheduled_costs):
            self.session.log(f"{self.name}: {line}")
        return stage

    def _first_sample(self) -> int:
        """The embedded default has seen the run's first samples: training on goes on with unseen ones."""
        if self.config.dense is not None:
            return 0
        return self.config.model.steps * self.config.train.global_batch_size

    def _require_space(self, stage: Stage) -> None:
        one = checkpoint_bytes(stage.train_module.checkpoint_tensors())
        kept = (self.config.train.keep_last or 2) + 1 + self.config.train.keep_best
        export_bytes = 4 * stage.costs.total_params
        folder = self.session.run_dir.path
        self.session.on_rank_zero(
            lambda: require_space(folder, kept * one + export_bytes, f"{kept} checkpoints and the export")
        )


class CPTStage(TrainedStage):
    """The baseline of both sparse-upcycling papers: the dense model on the same tokens."""

    name = "cpt"

    def _build(self, source: Path | None) -> Stage:
        self._fit_attention()
        model = self._dense()
        if source is not None:
            model.weights = CheckpointWeights()
        return self._stage(model, {})
