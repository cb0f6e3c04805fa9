"""Main job: upcycles a dense checkpoint to an MoE model, trains it, compares it and exports it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from moe.errors import Mistake
from recipes.config.schema import RunConfig
from recipes.config.sections.compare_config import CompareConfig
from recipes.data.sources import resolve
from recipes.jobs.base import Job, Session
from recipes.jobs.identity import check_resumed
from recipes.jobs.low_rank_rules import refuse_low_rank
from recipes.jobs.option_rules import check_options

if TYPE_CHECKING:
    from recipes.jobs.stage_run import StageInputs, StageRun


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

    def check_options(self, config: RunConfig, world_size: int) -> list[Mistake]:
        """Checks too that a resumed run began so, and that the default model can be trained on the data."""
        mistakes = check_options(config, world_size) + check_resumed(config, self.identity(config))
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

    def check_models(self, config: RunConfig, world_size: int) -> list[Mistake]:
        """See `recipes.jobs.preflight`."""
        from recipes.jobs.preflight import check_models

        return check_models(config, world_size)

    def stages(self, inputs: StageInputs) -> list[StageRun]:
        """Returns the stages of a run, in order."""
        from recipes.jobs.moe_stage import MOE
        from recipes.jobs.stage_run import CPT, StageRun

        config = inputs.config
        parts = [MOE, CPT] if config.section(CompareConfig).trains_cpt(config.dense) else [MOE]
        return [StageRun(inputs, own) for own in parts]

    def planned_steps(self, config: RunConfig) -> dict[str, int]:
        """Returns the steps of each stage, in order, for the time that a run has left; empty if unknown."""
        if CompareConfig not in self.sections:
            return {}
        names = ["moe", "cpt"] if config.section(CompareConfig).trains_cpt(config.dense) else ["moe"]
        return dict.fromkeys(names, config.train.steps)

    def models(self, config: RunConfig) -> tuple[str, ...]:
        """Returns that of each stage."""
        return tuple(self.planned_steps(config))

    def run(self, session: Session) -> bool:
        """See `recipes.jobs.run_stages`."""
        from recipes.jobs.run_stages import run_stages

        return run_stages(self, session)
