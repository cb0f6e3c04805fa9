"""Job that trains an upcycled model in two stages on two data sets.

The post-training of LLaMA-MoE v2 (arXiv 2411.15708): general conversations, then those of mathematics and
code. The second stage begins with the weights that the first has left; optimizer and schedule are its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe.errors import FieldError, Mistake
from recipes.config.schema import RunConfig
from recipes.config.sections.compare_config import CompareConfig
from recipes.config.sections.stage2_config import Stage2Config
from recipes.data.sources import check_paths, resolve
from recipes.jobs.stage2_options import FIRST, stage2_config
from recipes.jobs.upcycle_job import UpcycleJob

if TYPE_CHECKING:
    from recipes.jobs.stage_run import StageInputs, StageRun


class TwoStageJob(UpcycleJob):
    """Two stages of one MoE model; the second gives the run's model."""

    name = "two_stage"
    sections = (CompareConfig, Stage2Config)

    def check_options(self, config: RunConfig, world_size: int) -> list[Mistake]:
        """Checks the second stage too, and rejects options that have no meaning over two stages."""
        mistakes = super().check_options(config, world_size)
        second = stage2_config(config)
        stage2 = config.section(Stage2Config)
        own = second.data
        if stage2.path is None:
            rule = "the second stage has no data"
            mistakes.append(Mistake("stage2.path", None, rule, "Name its files."))
        else:
            mistakes += [m for m in check_paths(own, "stage2") if m not in mistakes]
            files = resolve(own, "stage2").files if not mistakes else ()
            if any(resolve(first).files == files for first in config.data.sources() if files):
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

    def planned_steps(self, config: RunConfig) -> dict[str, int]:
        """Returns the steps of both stages."""
        return {FIRST: config.train.steps, "moe": config.section(Stage2Config).steps}

    def stages(self, inputs: StageInputs) -> list[StageRun]:
        """Returns both stages, in order."""
        from recipes.jobs.two_stages import first_stage, second_stage

        return [first_stage(inputs), second_stage(inputs)]


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
