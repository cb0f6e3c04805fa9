"""Stage of a run: a model that is built, trained and reported, composed of parts that the job gives."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe.errors import ConfigError
from recipes.checkpoint import Origin, checkpoint_bytes, find_checkpoint, require_space, verify_checkpoint
from recipes.checkpoint.manifest import parse_manifest
from recipes.jobs.accounts import put_training, step_costs
from recipes.jobs.blend_use import foresee_blend
from recipes.jobs.top_k_schedules import describe_phases
from recipes.models.hf.deferred_init import CheckpointWeights
from recipes.runtime.run_file import read_run_file
from recipes.tracking.results import Results, stage_label
from recipes.training.model_costs import measure_costs, scheduled_costs, step_model
from recipes.training.stage import Stage, StageResult
from recipes.upcycling.convert.moe_plan import open_dense
from recipes.upcycling.sharded.sharded_models import dense_model

if TYPE_CHECKING:
    from recipes.config.schema import RunConfig
    from recipes.data.build_data import TrainData
    from recipes.engines.base import Engine
    from recipes.engines.console import RankConsole
    from recipes.jobs.rounding import Start
    from recipes.jobs.run_dir import RunDir
    from recipes.models.export import Exporter
    from recipes.models.hf.hf_model import HFModel
    from recipes.runtime.interrupt import StopRequest
    from recipes.tracking.ceilings import Peaks
    from recipes.training.training_loop import Loop


@dataclass(frozen=True)
class StageInputs:
    """Everything that the stages of a run share.

    Attributes:
        config: Config of the run.
        console: Its ranks.
        loop: Training loop.
        run_dir: Run directory.
        stop: Asks for an early end.
        folder: Dense checkpoint.
        data: Samples of the run.
        results: Content of ``summary.json``.
        peaks: Peak rates of a rank's device.
        started: Time of the command, by `steady_time`.
    """

    config: RunConfig
    console: RankConsole
    loop: Loop
    run_dir: RunDir
    stop: StopRequest
    folder: Path
    data: TrainData
    results: Results
    peaks: Peaks
    started: float

    @property
    def engine(self) -> Engine[Any]:
        """The open engine."""
        return self.console.engine


@dataclass(frozen=True)
class Built:
    """Model of a stage, before the engine prepares it.

    Attributes:
        model: The model.
        state: State of the run that checkpoints carry.
        begin: Changes or tries the prepared stage before the first step of this process, once the weights
            that it goes on with are loaded; None for nothing.
        blank: Makes a model of its shapes, without low-rank factors; None where nothing is exported.
        begun: Returns the weights of step 0; None where nothing is exported.
        format: Format that it is exported in; None for the best that holds it exactly.
    """

    model: HFModel
    state: dict[str, Any]
    begin: Callable[[Stage], None] | None = None
    blank: Callable[[], HFModel] | None = None
    begun: Callable[[], Start] | None = None
    format: Exporter | None = None


@dataclass(frozen=True)
class StageParts:
    """Parts that make one stage differ from another.

    Attributes:
        name: Name in metrics, results and folders.
        build: Builds the model, given the checkpoint that follows or None; None when asked to stop meanwhile.
        report: Writes results after the last step; None for the row of `StageRun.run` alone.
        source: Finds the checkpoint to go on from.
        budget: Returns the config with the stage's length; None while that is not known.
        prepare: Makes the budget known where it is not.
        label: Name for people; None for the usual one.
        first_sample: Index of the first sample; None for that behind the default model's training.
        earlier_tokens: Tokens that earlier stages of the same model have trained on.
    """

    name: str
    build: Callable[[StageRun, Path | None], Built | None]
    report: Callable[[StageRun, Stage, StageResult], None] | None = None
    source: Callable[[StageRun], Path | None] = lambda run: run.own_checkpoint()
    budget: Callable[[RunConfig], RunConfig | None] = lambda config: config
    prepare: Callable[[StageRun], None] | None = None
    label: str | None = None
    first_sample: int | None = None
    earlier_tokens: int = 0


class StageRun:
    """Runs one stage of a job.

    Attributes:
        inputs: Shared by all stages of the run.
        name: Name of the stage.
        config: The run's config with the stage's own length.
        data: Samples.
        blank, begun, format: As those of `Built`, once the model is built.
    """

    def __init__(self, inputs: StageInputs, parts: StageParts) -> None:
        self.inputs = inputs
        self.parts = parts
        self.name = parts.name
        self.config = inputs.config
        self.data = inputs.data
        self.results = inputs.results
        self.engine = inputs.engine
        self.log = inputs.console.log
        self.blank: Callable[[], HFModel] | None = None
        self.begun: Callable[[], Start] | None = None
        self.format: Exporter | None = None

    @property
    def finished(self) -> bool:
        """True once all steps are done; a finished run goes on when it is resumed with more of them."""
        config, row = self.parts.budget(self.config), self.results.row(self.name)
        if config is None or row is None:
            return False
        own = config.train.steps * config.train.global_batch_size * self.data.train.seq_len
        return bool(row["tokens"] >= self.parts.earlier_tokens + own)

    def _require_ahead(self, source: Path | None) -> None:
        """Requires that the checkpoint which the stage goes on from is of none of its later steps.

        Raises:
            ConfigError: It is of a step behind the last one that is asked for.
        """
        steps = self.config.train.steps
        step = 0 if source is None else self.inputs.console.on_rank_zero(lambda: parse_manifest(source).step)
        if step > steps:
            rule = f"the checkpoint that {self.name} goes on from, {source}, is of step {step} already"
            remedy = (
                f"Set {step} or more, or give an earlier checkpoint by resume=PATH with another run.name."
            )
            raise ConfigError.one("train.steps", steps, rule, remedy)

    def run(self) -> bool:
        """Trains the stage, unless an earlier process has; returns True when it is finished."""
        if self.parts.budget(self.config) is None and self.parts.prepare is not None:
            self.parts.prepare(self)
        config = self.parts.budget(self.config)
        assert config is not None, f"{self.name}: the stages before it make its length known"
        self.config = config
        foresee_blend(self.data, self._first_sample() + config.train.steps * config.train.global_batch_size)
        if self.finished:
            self.log(f"{self.name}: finished by an earlier process of this run")
            return True
        gc.collect()
        started = time.monotonic()
        loop = self.inputs.loop
        self.beat("looking for a checkpoint")
        source = self.parts.source(self)
        self._require_ahead(source)
        self.beat("making the model")
        built = self.parts.build(self, source)
        if built is None:
            return False
        self.blank, self.begun, self.format = built.blank, built.begun, built.format
        stage = self._prepare(built)
        if source is not None:
            self.log(f"{self.name}: going on from {source}")
            self.beat("loading the checkpoint")
            stage.state |= loop.resume(stage, source)
        if built.begin is not None:
            built.begin(stage)
        result = loop.run(stage)
        self.beat("its results")
        if self.inputs.console.is_rank0:
            put_training(self.inputs.run_dir.path, self.results, self.name, result.missing)
        self.results.add_time(f"{self.name}_s", time.monotonic() - started)
        if loop.first_step_time is not None:
            seconds = loop.first_step_time - self.inputs.started
            self.results.content["timings"].setdefault("first_step_s", seconds)
        if result.finished:
            self._report(stage, result)
        self.results.write()
        return result.finished

    def beat(self, where: str) -> None:
        """Tells the heartbeat what comes next."""
        self.inputs.console.heartbeat.beat(f"{self.name}: {where}")

    def own_checkpoint(self) -> Path | None:
        """Returns the stage's newest checkpoint; for the model's own stage also that of another run."""
        run_dir = self.inputs.run_dir
        if run_dir.resumed:
            found = find_checkpoint(run_dir.checkpoints(self.name), run=run_dir.run_id)
            for line in found.lines():
                self.log(f"{self.name}: {line}")
            if found.path is not None:
                return found.path
        fork = self.inputs.console.on_rank_zero(lambda: read_run_file(run_dir.path).get("fork"))
        if self.name != "moe" or fork is None:
            return None
        verify_checkpoint(fork)
        return Path(fork)

    def dense(self) -> HFModel:
        """Returns the dense model without memory: the engine then has each rank read its own part."""
        trust = self.config.trust_remote_code
        return dense_model(open_dense(self.inputs.folder, trust_remote_code=trust), trust_remote_code=trust)

    def _report(self, stage: Stage, result: StageResult) -> None:
        if self.parts.report is not None:
            self.parts.report(self, stage, result)
        self.results.put_stage(
            self.name,
            self.parts.label or stage_label(self.name),
            result.val_loss,
            self.parts.earlier_tokens + result.step * stage.tokens_per_step,
            stage.costs,
            result.tokens_per_s,
        )

    def _prepare(self, built: Built) -> Stage:
        engine, model, peaks = self.engine, built.model, self.inputs.peaks
        peak, bandwidth = peaks.flops, peaks.bandwidth
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
            step_costs=step_costs(engine, model, cost_model, train_module, bandwidth),
            checkpoints=self.inputs.run_dir.checkpoints(self.name),
            origin=Origin(self.inputs.run_dir.run_id),
            state=built.state,
            first_sample=self._first_sample(),
            seed=self.config.seed,
        )
        self._require_space(stage)
        self.log(
            f"{self.name}: {costs.total_params:,} parameters, {costs.active_params:,} active a token; "
            f"utilisation is of {peaks.words()}"
        )
        for line in describe_phases(model.schedule, stage.scheduled_costs):
            self.log(f"{self.name}: {line}")
        return stage

    def _first_sample(self) -> int:
        return first_sample(self.config) if self.parts.first_sample is None else self.parts.first_sample

    def _require_space(self, stage: Stage) -> None:
        one = checkpoint_bytes(stage.train_module.checkpoint_tensors())
        kept = (self.config.train.keep_last or 2) + 1 + self.config.train.keep_best
        export_bytes = 4 * stage.costs.total_params
        folder = self.inputs.run_dir.path
        self.inputs.console.on_rank_zero(
            lambda: require_space(folder, kept * one + export_bytes, f"{kept} checkpoints and the export")
        )


def first_sample(config: RunConfig) -> int:
    """Returns the first sample that the default model, if one was trained, has not seen."""
    return config.model.steps * config.train.global_batch_size if config.dense is None else 0


def build_dense(run: StageRun, source: Path | None) -> Built:
    """Builds the dense model: the baseline of both sparse-upcycling papers, on the same tokens."""
    model = run.dense()
    if source is not None:
        model.weights = CheckpointWeights()
    return Built(model, {})


CPT = StageParts("cpt", build_dense)


def with_steps(config: RunConfig, steps: int) -> RunConfig:
    """Returns the config of a run of so many steps whose checkpoints shorter runs can branch off from."""
    every = config.train.eval_every
    train = replace(config.train, steps=steps, save_every=every, keep_last=steps // every + 1)
    return replace(config, train=train)
