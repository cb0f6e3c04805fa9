"""One cell of `upcycle_vs_cpt`: upcycled, dense continued, and a mixture from scratch, from one dense model.

The idea is that of S. Doubov, N. Sardana, V. Chiley, "Sparse Upcycling: Inference Inefficient Finetuning",
arXiv:2411.08968: what training gains is set against what serving then costs.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moe.accounting.shape import attention_from_config, shape_from_config
from moe.errors import CheckpointError, ConfigError, Mistake
from moe.layer import MoELayer
from moe.routing.draws import seeded_generator
from moe.upcycle import upcycle_methods
from recipes.checkpoint import verify_checkpoint
from recipes.checkpoint.manifest import parse_step, step_name
from recipes.config.renamed import with_new_names
from recipes.config.schema import RunConfig
from recipes.config.sections.upcycle_vs_cpt_config import UpcycleVsCPTConfig
from recipes.jobs.base import Session
from recipes.jobs.budget import continued_steps, scratch_steps
from recipes.jobs.default_model import default_tokenizer, fresh_model
from recipes.jobs.moe_stage import MoEStage
from recipes.jobs.serving import serving_costs
from recipes.jobs.trained_stage import CPTStage, TrainedStage
from recipes.jobs.upcycle_job import UpcycleJob
from recipes.models.hf.ffn_surgery import swap
from recipes.models.hf.hf_model import HFModel
from recipes.models.hf.inspection import read_config
from recipes.runtime.run_file import read_run_file, write_run_file
from recipes.training.model_costs import measure_costs
from recipes.training.training_loop import Stage, StageResult
from recipes.upcycling.surgery import make_surgery


class UpcycleVsCPTJob(UpcycleJob):
    """The legs that ``upcycle_vs_cpt.arms`` names, each budget a finished run of its own.

    Under a schedule that stays and then decays, shorter runs share the constant part of the longest: they
    branch off from its checkpoints, and are to the last bit what they would be on their own.
    """

    name = "upcycle_vs_cpt"
    takes_attention = False
    needs_weights = "the arms are compared with all of their weights trained"

    def check(self, config: RunConfig, world_size: int) -> list[Mistake]:
        """What would make the arms incomparable, too."""
        mistakes = super().check(config, world_size) + _check_points(config)
        method = upcycle_methods()[config.upcycle.name](config.upcycle)
        if config.section(UpcycleVsCPTConfig).arms != "continued" and (method.statistics or method.sources):
            rule = "a mixture from scratch has no dense model to look at"
            remedy = "Set upcycle_vs_cpt.arms=continued, or take a method that reads weights alone."
            mistakes.append(Mistake("upcycle.name", config.upcycle.name, rule, remedy))
        if config.top_k_schedule:
            rule = "the arms are compared at FLOPs that do not change over a run"
            mistakes.append(Mistake("top_k_schedule", len(config.top_k_schedule), rule, "Leave it out."))
        if not mistakes and config.dense is not None:
            mistakes += _check_flops(config.dense)
        return mistakes

    def kinds(self, config: RunConfig) -> list[Callable[..., TrainedStage]]:
        """The upcycled model first: it says the others' budgets. Of an arm the longest run first."""
        arms, sunk = config.section(UpcycleVsCPTConfig).arms, sunk_steps(config)
        stages: list[Callable[..., TrainedStage]] = []
        if arms != "scratch":
            stages += [UpcycledStage, ContinuedStage, EqualTokensStage]
        if arms != "continued":
            stages.append(partial(ScratchStage, sunk=sunk[-1]))
            stages += [partial(ScratchBranch, sunk=steps) for steps in sunk[:-1]]
        return stages

    def run(self, session: Session) -> bool:
        """Leaves the newest checkpoint of every leg: those to branch off from have been of use.

        Raises:
            CheckpointError: The run began with other budgets: what has decayed does not go on.
        """
        session.on_rank_zero(lambda: _refuse_other_budgets(session))
        ended = super().run(session)
        if ended:
            session.on_rank_zero(lambda: _prune(session.run_dir.path))
        return ended


def sunk_steps(config: RunConfig) -> list[int]:
    """Dense steps whose FLOPs a mixture from scratch gets on top, ascending; 0, for none, is among them."""
    own = config.model.steps if config.dense is None else 0
    asked = config.section(UpcycleVsCPTConfig).sunk_steps
    given = [own] if asked is None else asked
    return sorted({0, *given})


def _check_points(config: RunConfig) -> list[Mistake]:
    mistakes = []
    train, kind = config.train, config.optim.schedule.kind
    if kind != "wsd":
        rule = "shorter runs branch off from longer ones, which needs a learning rate that stays"
        mistakes.append(Mistake("optim.schedule.kind", kind, rule, "Set it to wsd."))
    if train.steps < 1:
        mistakes.append(Mistake("train.steps", train.steps, "there is nothing to compare", "Set 1 or more."))
    if train.eval_every < 1:
        rule = "its checkpoints are what shorter runs branch off from"
        mistakes.append(Mistake("train.eval_every", train.eval_every, rule, "Set it to 1 or more."))
    return mistakes


def _refuse_other_budgets(session: Session) -> None:
    config, path = session.config, session.run_dir.path
    wanted = {
        "train.steps": config.train.steps,
        "train.eval_every": config.train.eval_every,
        "upcycle_vs_cpt.sunk_steps": sunk_steps(config),
        "optim.lr": config.optim.lr,
        "optim.schedule": dataclasses.asdict(config.optim.schedule),
        "upcycle_vs_cpt.scratch_lr": config.section(UpcycleVsCPTConfig).scratch_lr,
    }
    began = with_new_names(read_run_file(path).get("budgets", wanted))
    remedy = "Set it back to go on, or start a new run with resume=none."
    changed = [
        Mistake(name, value, f"the run in {path} began with {began[name]!r}", remedy)
        for name, value in wanted.items()
        if began[name] != value
    ]
    if changed:
        raise CheckpointError(changed)
    write_run_file(path, budgets=wanted)


def _prune(run_dir: Path) -> None:
    for checkpoints in (*run_dir.glob("checkpoints"), *run_dir.glob("*/checkpoints")):
        steps = sorted(path for path in checkpoints.iterdir() if parse_step(path.name) is not None)
        for path in steps[:-1]:
            shutil.rmtree(path)


def _check_flops(dense: str) -> list[Mistake]:
    try:
        attention_from_config(read_config(Path(dense).expanduser()))
    except ConfigError as error:
        remedy = "Use a family that python -m tools.describe knows."
        return [Mistake("dense", dense, f"its FLOPs cannot be counted: {error.mistakes[0].rule}", remedy)]
    return []


class UpcycledStage(MoEStage):
    """The upcycled model, with what serving costs before and after."""

    def _finish(self, stage: Stage, result: StageResult) -> None:
        super()._finish(stage, result)
        exported = json.loads((self.session.run_dir.export / "config.json").read_text(encoding="utf-8"))
        contents = {"dense": read_config(self.folder), "moe": exported}
        self.results.put("serving", {model: self._serving(content) for model, content in contents.items()})
        _, layer = stage.train_module.model.moe_layers()[0]
        experts = self.config.upcycle.num_experts
        self.results.put("moe", {"num_experts": experts, "top_k": layer.router.top_k})
        self.results.put("tokens_per_step", stage.tokens_per_step)

    def _serving(self, content: dict[str, Any]) -> list[dict[str, Any]] | None:
        """None where the accounting does not know the family: a shape is never guessed."""
        try:
            shape = shape_from_config(content)
        except ConfigError:
            return None
        return serving_costs(shape, self.config.section(UpcycleVsCPTConfig).batches, self.config.data.seq_len)


def _with_steps(config: RunConfig, steps: int) -> RunConfig:
    """A run of so many steps that keeps what can be branched off from."""
    every = config.train.eval_every
    train = dataclasses.replace(config.train, steps=steps, save_every=every, keep_last=steps // every + 1)
    return dataclasses.replace(config, train=train)


def _branch_source(stage: TrainedStage, parent: str) -> Path:
    """The newest checkpoint of a longer run that lies in the constant part of this one.

    The parent decays later, since it is longer: up to there both are one run.
    """
    train, schedule = stage.config.train, stage.config.optim.schedule
    constant = max(train.steps - schedule.decay_steps(train.steps), 0)
    step = constant // train.eval_every * train.eval_every
    path = stage.session.run_dir.checkpoints(parent) / step_name(step)
    verify_checkpoint(path)
    return path


class ContinuedStage(CPTStage):
    """The dense model, until it has cost what the upcycled model has."""

    @property
    def finished(self) -> bool:
        """Not before the upcycled model has said how far that is."""
        return self._take_steps() and super().finished

    def run(self) -> bool:
        """Trains for as many FLOPs as the upcycled model has."""
        taken = self._take_steps()
        assert taken, "the upcycled leg comes first and leaves the rows of both models"
        return super().run()

    def _take_steps(self) -> bool:
        dense, moe = (self.results.row(name) for name in ("dense", "moe"))
        if dense is None or moe is None:
            return False
        costs = [row["flops_per_token_train"] for row in (dense, moe)]
        self.config = _with_steps(self.session.config, self._budget(*costs))
        return True

    def _budget(self, dense_flops: float, moe_flops: float) -> int:
        return continued_steps(self.session.config.train.steps, dense_flops, moe_flops)


class EqualTokensStage(ContinuedStage):
    """The dense model on as many tokens as the upcycled one: the start of the longer run, and its own end."""

    name = "cpt_tokens"

    def _budget(self, dense_flops: float, moe_flops: float) -> int:
        return self.session.config.train.steps

    def _source(self) -> Path | None:
        own = super()._source()
        if own is not None or _from_zero(self):
            return own
        return _branch_source(self, "cpt")


def _from_zero(stage: TrainedStage) -> bool:
    """Whether a run decays before its first checkpoint: then there is nothing to share."""
    train, schedule = stage.config.train, stage.config.optim.schedule
    return train.steps - schedule.decay_steps(train.steps) < train.eval_every


class ScratchStage(TrainedStage):
    """The same mixture on drawn weights, from the first sample on: it sees what the dense model saw."""

    name = "scratch"

    def __init__(self, *parts: Any, sunk: int) -> None:
        super().__init__(*parts)
        self.sunk = sunk
        config = self.config
        lr = config.section(UpcycleVsCPTConfig).scratch_lr or config.optim.lr
        self.config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=lr))

    @property
    def finished(self) -> bool:
        """Whether it has come to the end of its budget."""
        return self._take_steps() and super().finished

    def run(self) -> bool:
        """Trains for the upcycled model's steps and the dense model's FLOPs."""
        if not self._take_steps():
            self._count()
            self._take_steps()
        return super().run()

    def _take_steps(self) -> bool:
        flops = self.results.content.get("scratch_flops")
        if flops is None:
            return False
        steps = scratch_steps(self.session.config.train.steps, self.sunk, flops["dense"], flops["moe"])
        self.config = _with_steps(self.config, steps)
        return True

    def _count(self) -> None:
        """FLOPs of both models: before the steps are known, no leg is."""
        model = self._drawn()
        dense = measure_costs(model, self.config.data.seq_len, None).flops_per_token_train
        swap(model, make_surgery(self.config))
        moe = measure_costs(model, self.config.data.seq_len, None).flops_per_token_train
        self.results.put("scratch_flops", {"dense": dense, "moe": moe})

    def _first_sample(self) -> int:
        return 0

    def _build(self, source: Path | None) -> Stage:
        model = self._drawn()
        for _, layer in swap(model, make_surgery(self.config)):
            _draw(layer, self.config)
        return self._stage(model, {})

    def _drawn(self) -> HFModel:
        """The dense model's shape with weights that nobody has trained."""
        config, seed = self.config, self.config.seed
        if config.dense is None:
            model = dataclasses.replace(config.model, seed=seed)
            return fresh_model(model, config.data.seq_len, default_tokenizer(self.session))
        from transformers import AutoConfig, AutoModelForCausalLM

        trust = config.trust_remote_code
        shape = AutoConfig.from_pretrained(self.folder, local_files_only=True, trust_remote_code=trust)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            built = AutoModelForCausalLM.from_config(shape, trust_remote_code=trust, dtype=torch.float32)
        built.config.use_cache = False
        return HFModel(module=built, folder=self.folder, source_dtype=torch.float32)


class ScratchBranch(ScratchStage):
    """The mixture from scratch at a smaller budget."""

    def __init__(self, *parts: Any, sunk: int) -> None:
        super().__init__(*parts, sunk=sunk)
        self.name = f"scratch_{sunk}"

    def _source(self) -> Path | None:
        own = super()._source()
        if own is not None or _from_zero(self):
            return own
        return _branch_source(self, "scratch")


@torch.no_grad()
def _draw(layer: MoELayer, config: RunConfig) -> None:
    """Draws experts and router anew: a method's experts know of each other, even those of drawn networks."""
    index = layer.context.layer_index
    generator = seeded_generator(config.seed, "scratch", index)
    for part, axes in ((layer.experts, 3), (layer.shared, 2)):
        for parameter in [] if part is None else part.parameters():
            if parameter.ndim < axes:
                parameter.zero_()
            else:
                parameter.normal_(0.0, config.section(UpcycleVsCPTConfig).init_std, generator=generator)
    layer.router.reset_parameters(seeded_generator(config.seed, "scratch-router", index))
