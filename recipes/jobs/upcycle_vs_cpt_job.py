"""Job `upcycle_vs_cpt`: from one dense model, upcycled, dense continued, and an MoE model from scratch.

The idea is that of S. Doubov, N. Sardana, V. Chiley, "Sparse Upcycling: Inference Inefficient Finetuning",
arXiv:2411.08968: what training gains is set against what serving then costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe.errors import ConfigError, Mistake
from moe.upcycle import upcycle_method
from recipes.config.schema import RunConfig
from recipes.config.sections.upcycle_vs_cpt_config import UpcycleVsCPTConfig
from recipes.jobs.base import Session
from recipes.jobs.upcycle_job import UpcycleJob
from recipes.models.hf.config_file import read_config

if TYPE_CHECKING:
    from recipes.jobs.stage_run import StageInputs, StageRun


class UpcycleVsCPTJob(UpcycleJob):
    """Stages that ``upcycle_vs_cpt.arms`` names, each budget a finished run of its own.

    Under a schedule that stays and then decays, shorter runs share the constant part of the longest: they
    branch off from its checkpoints, and are to the last bit what they would be on their own.
    """

    name = "upcycle_vs_cpt"
    sections = (UpcycleVsCPTConfig,)
    takes_attention = False
    needs_weights = "the arms are compared with all of their weights trained"

    def check_options(self, config: RunConfig, world_size: int) -> list[Mistake]:
        """Checks too that the arms can be compared."""
        mistakes = super().check_options(config, world_size) + _check_points(config)
        if config.top_k_schedule:
            rule = "the arms are compared at FLOPs that do not change over a run"
            mistakes.append(Mistake("top_k_schedule", len(config.top_k_schedule), rule, "Leave it out."))
        return mistakes

    def check_models(self, config: RunConfig, world_size: int) -> list[Mistake]:
        """Checks too that the method needs no dense model, and that FLOPs can be counted."""
        if mistakes := super().check_models(config, world_size):
            return mistakes
        method = upcycle_method(config.upcycle)
        if config.section(UpcycleVsCPTConfig).arms != "continued" and (method.statistics or method.sources):
            rule = "an MoE model from scratch has no dense model to look at"
            remedy = "Set upcycle_vs_cpt.arms=continued, or take a method that reads weights alone."
            mistakes.append(Mistake("upcycle.name", config.upcycle.name, rule, remedy))
        elif config.dense is not None:
            mistakes += _check_flops(config.dense)
        return mistakes

    def models(self, config: RunConfig) -> tuple[str, ...]:
        """Returns those of the arms."""
        return arm_models(config.section(UpcycleVsCPTConfig).arms, sunk_steps(config))

    def stages(self, inputs: StageInputs) -> list[StageRun]:
        """Returns the upcycled model first, which sets the budgets, and of each arm the longest run first."""
        from recipes.jobs.arm_stages import arm_stages

        return arm_stages(inputs, sunk_steps(inputs.config))

    def run(self, session: Session) -> bool:
        """Runs the arms, and leaves the newest checkpoint of every stage: the others were to branch off from.

        Raises:
            CheckpointError: The run began with other budgets: a model that has decayed does not go on.
        """
        from recipes.jobs.arm_stages import prune, refuse_other_budgets

        config, console, path = session.config, session.console, session.run_dir.path
        console.on_rank_zero(lambda: refuse_other_budgets(config, sunk_steps(config), path))
        ended = super().run(session)
        if ended:
            console.on_rank_zero(lambda: prune(session.run_dir))
        return ended


def sunk_steps(config: RunConfig) -> list[int]:
    """Returns the dense steps whose FLOPs a model from scratch gets on top, ascending from 0, for none."""
    own = config.model.steps if config.dense is None else 0
    asked = config.section(UpcycleVsCPTConfig).sunk_steps
    given = [own] if asked is None else asked
    return sorted({0, *given})


def arm_models(arms: str, sunk: Sequence[int]) -> tuple[str, ...]:
    """Returns the models of a finished run besides the dense one.

    Args:
        arms: ``continued``, ``scratch`` or ``both``.
        sunk: As of `sunk_steps`.
    """
    continued = () if arms == "scratch" else ("moe", "cpt", "cpt_tokens")
    scratch = () if arms == "continued" else ("scratch", *(f"scratch_{steps}" for steps in sunk[:-1]))
    return continued + scratch


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


def _check_flops(dense: str) -> list[Mistake]:
    from moe.accounting.shape import attention_from_config

    try:
        attention_from_config(read_config(Path(dense).expanduser()))
    except ConfigError as error:
        remedy = "Use a family that python -m tools.describe knows."
        return [Mistake("dense", dense, f"its FLOPs cannot be counted: {error.mistakes[0].rule}", remedy)]
    return []
