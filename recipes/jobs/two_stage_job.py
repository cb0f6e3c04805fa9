"""A dense checkpoint becomes a mixture, and is trained in two stages on two data sets.

The post-training of LLaMA-MoE v2 (arXiv 2411.15708): general conversations, then those of mathematics and
code. The second stage begins with the weights that the first has left; optimizer and schedule are its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe.errors import CheckpointError, FieldError, Mistake
from moe.upcycle import UpcycleMethod
from recipes.checkpoint import find_checkpoint, load_checkpoint, local_memory
from recipes.config.schema import RunConfig
from recipes.config.sections.compare_config import CompareConfig
from recipes.config.sections.stage2_config import Stage2Config
from recipes.data.build_data import TrainData
from recipes.data.sources import check_paths, resolve
from recipes.engines.optim.optimizer import FrozenConfig
from recipes.jobs.base import Session
from recipes.jobs.default_model import shared_data, vocab_size_of
from recipes.jobs.moe_stage import MoEStage
from recipes.jobs.trained_stage import TrainedStage
from recipes.jobs.upcycle_job import UpcycleJob
from recipes.models.hf.packed_attention import attending_as
from recipes.runtime.run_file import read_run_file, write_run_file
from recipes.tracking.ceilings import Peaks
from recipes.tracking.results import Results
from recipes.training.training_loop import Stage, StageResult, validation_loss
from recipes.upcycling.calibration.gather import LayerTensors, kept_statistics


class TwoStageJob(UpcycleJob):
    """Two legs of one mixture; the second is the run's model."""

    name = "two_stage"

    def check(self, config: RunConfig, world_size: int) -> list[Mistake]:
        """The second stage's data and schedule too, and what has no meaning over two stages."""
        mistakes = super().check(config, world_size)
        second = stage2_config(config)
        stage2 = config.section(Stage2Config)
        own = dataclasses.replace(second.data, path=stage2.path)
        if stage2.path is None:
            rule = "the second stage has no data"
            mistakes.append(Mistake("stage2.path", None, rule, "Name its files."))
        else:
            mistakes += [m for m in check_paths(own, "stage2") if m not in mistakes]
            if not mistakes and resolve(config.data).files == resolve(own, "stage2").files:
                rule = "it is the data of the first stage"
                remedy = "Name other files, or train one stage by +recipe=upcycle."
                mistakes.append(Mistake("stage2.path", stage2.path, rule, remedy))
        try:
            second.optim.schedule.check(stage2.steps)
        except FieldError as error:
            mistakes += error.under("stage2").mistakes
        return mistakes + _check_meaning(config)

    def identity(self, config: RunConfig) -> dict[str, Any]:
        """Returns the first stage's length, at which the second begins, and the second's data."""
        stage2 = config.section(Stage2Config)
        return {
            "train.steps": config.train.steps,
            "stage2.path": stage2.path,
            "stage2.validation_path": stage2.validation_path,
        }

    def kinds(self, config: RunConfig) -> list[Callable[..., TrainedStage]]:
        """The stages."""
        return [FirstStage, SecondStage]


def _check_meaning(config: RunConfig) -> list[Mistake]:
    mistakes = []
    if config.train.steps < 1:
        rule = "a stage trains"
        mistakes.append(Mistake("train.steps", config.train.steps, rule, "Set 1 or more."))
    compare = config.section(CompareConfig)
    if compare.trains_cpt(config.dense):
        rule = "two stages have no dense baseline"
        mistakes.append(Mistake("compare.cpt", compare.cpt, rule, "Set it to false."))
    if Path(config.resume).name.startswith("step-"):
        rule = "a checkpoint belongs to one of the two stages, and a run goes on with both"
        mistakes.append(Mistake("resume", config.resume, rule, "Give the run directory."))
    return mistakes


def stage2_config(config: RunConfig) -> RunConfig:
    """A run's config as the second stage sees it: experts a token as the first ended with, nothing frozen."""
    stage = config.section(Stage2Config)
    schedule = dataclasses.replace(config.optim.schedule, warmup_steps=stage.warmup_steps)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path=stage.path, validation_path=stage.validation_path),
        train=dataclasses.replace(config.train, steps=stage.steps),
        optim=dataclasses.replace(config.optim, lr=stage.lr, schedule=schedule, frozen=FrozenConfig()),
        top_k_schedule=[],
    )


class _TwoStagePart(MoEStage):
    """What both have in common: the statistics that the experts were planned by are the run's."""

    number: int

    def _statistics(self, method: UpcycleMethod[Any], source: Path | None) -> LayerTensors | None:
        if source is None or not method.statistics:
            return super()._statistics(method, source)
        return kept_statistics(
            self.session.console,
            self.session.run_dir.path,
            self.session.run_dir.checkpoints("moe") / source.name,
        )

    def _put_stage(self, result: StageResult, tokens: int, **more: Any) -> None:
        """A section of the stage, replacing that of an earlier process."""
        row = {
            "stage": self.number,
            "data": self.config.data.path,
            "steps": result.step,
            "tokens": tokens,
            "lr": self.config.optim.lr,
            "val_loss_before": result.first_val_loss,
            "val_loss": result.val_loss,
        }
        others = [old for old in self.results.content.get("stages", []) if old["stage"] != self.number]
        self.results.put("stages", sorted([*others, row | more], key=lambda old: old["stage"]))


class FirstStage(_TwoStagePart):
    """Upcycles and trains; nothing is exported yet."""

    name = "stage1"
    number = 1

    def _finish(self, stage: Stage, result: StageResult) -> None:
        self.results.put("exactness", stage.state["exactness"])
        self._put_stage(result, result.step * stage.tokens_per_step)


class SecondStage(_TwoStagePart):
    """Goes on with the first stage's weights."""

    name = "moe"
    number = 2

    def __init__(
        self, session: Session, folder: Path, data: TrainData, results: Results, peaks: Peaks
    ) -> None:
        config = stage2_config(session.config)
        own = dataclasses.replace(session, config=config)
        session.heartbeat.beat("reading the data of stage 2")
        session.log(f"stage 2: {config.data.path}")
        second = shared_data(own, folder, session.on_rank_zero(lambda: vocab_size_of(folder)))
        session.on_rank_zero(lambda: _refuse_other_data(session, second))
        super().__init__(own, folder, second, results, peaks)
        self.first_data = data
        self.first_steps = session.config.train.steps
        self.first_tokens = (
            session.config.train.steps * session.config.train.global_batch_size * data.train.seq_len
        )

    @property
    def finished(self) -> bool:
        """Its row counts the tokens of both stages."""
        row = self.results.row(self.name)
        own = self.config.train.steps * self.config.train.global_batch_size * self.data.train.seq_len
        return row is not None and row["tokens"] >= self.first_tokens + own

    def run(self) -> bool:
        """Trains it, and completes the rows of both stages."""
        if self.finished:
            return super().run()
        if not super().run():
            return False
        row = self.results.row(self.name)
        assert row is not None, "a finished leg has a row"
        row |= {"label": "MoE after stage 2", "tokens": row["tokens"] + self.first_tokens}
        self.results.write()
        return True

    def _build(self, source: Path | None) -> Stage | None:
        if source is not None:
            return super()._build(source)
        begun = self._end_of_stage1()
        stage = super()._build(begun)
        assert stage is not None, "nothing is calibrated, so that nothing can be stopped"
        tensors = stage.train_module.checkpoint_tensors()
        loaded = load_checkpoint(begun, tensors, checksums=False)
        for name, tensor in tensors.items():
            if name.startswith("optim."):
                for memory in local_memory(tensor):
                    memory.zero_()  # as before an optimizer's first step
        stage.state |= {key: loaded.state[key] for key in ("exactness", "attention") if key in loaded.state}
        self.session.log(f"stage 2: begins with the weights of {begun}")
        return stage

    def _end_of_stage1(self) -> Path:
        folder = self.session.run_dir.checkpoints(FirstStage.name)
        found = find_checkpoint(folder)
        if found.path is None or int(found.path.name.removeprefix("step-")) != self.first_steps:
            rule = "the last checkpoint of the first stage is missing, and the second begins with it"
            raise CheckpointError.one("resume", str(folder), rule, "Restore it, or start a new run.")
        return found.path

    def _first_sample(self) -> int:
        """Nothing has been trained on this data."""
        return 0

    def _finish(self, stage: Stage, result: StageResult) -> None:
        engine, train = self.session.engine, self.config.train
        first = attending_as(self.first_data, self.data)
        again = validation_loss(engine, stage.train_module, first, train, self.session.heartbeat)
        self._put_stage(result, result.step * stage.tokens_per_step, val_loss_stage1=again)
        ended = self.results.content["stages"][0]["val_loss"]
        self.session.log(
            f"stage 1: validation loss on its own data {ended:.4f} at its end, {again:.4f} after stage 2"
        )
        before = self.results.row(FirstStage.name)
        assert before is not None, "the second stage comes after the first"
        # Beside the others, which are validated on the second stage's data.
        before["val_loss"] = result.first_val_loss
        super()._finish(stage, result)


def _refuse_other_data(session: Session, data: TrainData) -> None:
    """The data of the second stage may not change when a run goes on, also while it is in the first."""
    began = read_run_file(session.run_dir.path).get("stage2_data")
    if began not in (None, data.fingerprint):
        rule = "the run began with other data for its second stage"
        remedy = "Set it back to go on, or start a new run with resume=none."
        raise CheckpointError.one("stage2.path", session.config.section(Stage2Config).path, rule, remedy)
    write_run_file(session.run_dir.path, stage2_data=data.fingerprint)
