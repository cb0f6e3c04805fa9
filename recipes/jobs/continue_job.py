"""Job that goes on training a mixture as it is, and writes it back in its own format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe.errors import Mistake
from moe.routers.configs.topk_config import TopKConfig
from moe.upcycle.configs.copies_config import CopyConfig
from recipes.config.schema import RunConfig
from recipes.config.sections.continue_config import ContinueConfig
from recipes.config.sections.prompts_config import PromptsConfig
from recipes.data.chat_template import check_chat_template
from recipes.data.sources import check_paths
from recipes.jobs.base import Job, Session
from recipes.jobs.option_rules import (
    check_batch,
    check_context,
    check_folders,
    check_layout,
    check_run_dir,
    check_schedule,
)
from recipes.models.hf.config_file import read_config
from recipes.models.hf.inspection import check_checkpoint
from recipes.runtime.extras import check_names

if TYPE_CHECKING:
    from recipes.jobs.stage_run import StageInputs, StageRun


class ContinueJob(Job):
    """Job from a mixture to the same mixture, trained on."""

    name = "continue"
    sections = (ContinueConfig,)

    def check_options(self, config: RunConfig, world_size: int) -> list[Mistake]:
        """Checks batch, schedule, data, folders and ranks, and that nothing asks for another model."""
        ranks = world_size // config.engine.model_parallel_size
        mistakes = check_batch(config, max(1, ranks)) + check_schedule(config) + check_paths(config.data)
        mistakes += check_folders(config) + check_names() + config.tracker.check() + check_run_dir(config)
        mistakes += _refuse_others(config) + check_layout(config)
        if config.dense is None:
            remedy = "Give the folder of a mixture by dense=FOLDER."
            return [*mistakes, Mistake("dense", None, "there is no mixture to go on with", remedy)]
        faults = check_checkpoint(config.dense, "dense", trust_remote_code=config.trust_remote_code)
        mistakes += faults + check_chat_template(config.data, config.dense)
        return mistakes if faults else mistakes + check_context(config, read_config(_folder(config)))

    def check_models(self, config: RunConfig, world_size: int) -> list[Mistake]:
        """Checks what the mixture's family and size tell."""
        from recipes.jobs.continue_stage import check_mixture

        return check_mixture(config)

    def models(self, config: RunConfig) -> tuple[str, ...]:
        """Returns the one that is trained."""
        return ("moe",)

    def planned_steps(self, config: RunConfig) -> dict[str, int]:
        """Returns the steps of the stage."""
        return {"moe": config.train.steps}

    def stages(self, inputs: StageInputs) -> list[StageRun]:
        """Returns the stage."""
        from recipes.jobs.continue_stage import CONTINUED
        from recipes.jobs.stage_run import StageRun

        return [StageRun(inputs, CONTINUED)]

    def run(self, session: Session) -> bool:
        """Trains the mixture with its own router in the place of the config's."""
        from recipes.jobs.continue_stage import of_mixture
        from recipes.jobs.run_stages import run_stages

        return run_stages(self, replace(session, config=of_mixture(session.config)))


def _folder(config: RunConfig) -> Path:
    return Path(config.dense or "").expanduser()


def _refuse_others(config: RunConfig) -> list[Mistake]:
    """Refuses options that would make another model of it, instead of ignoring them."""
    keeps = "the mixture keeps the router and the experts that it has"
    prompts = config.section(PromptsConfig).path
    asked = [
        *_changed("router", config.router, TopKConfig(), "Leave it out; continue.* balances it."),
        *_changed("upcycle", config.upcycle, CopyConfig(), "Leave it out."),
        ("top_k_schedule", config.top_k_schedule, [], "Leave it out."),
        ("attention", None if config.attention is None else "moe", None, "Set attention=none."),
        ("optim.start_from", config.optim.start_from, None, "Set null."),
        ("prompts.path", prompts, None, "Set null."),
    ]
    return [Mistake(path, value, keeps, remedy) for path, value, unset, remedy in asked if value != unset]


def _changed(section: str, own: Any, unset: Any, remedy: str) -> Iterator[tuple[str, Any, Any, str]]:
    """Yields path, value, value where nothing is asked for, and remedy of a section's options."""
    if own.name != unset.name:
        yield section, own.name, unset.name, remedy
        return
    for key, value in vars(own).items():
        yield f"{section}.{key}", value, getattr(unset, key), remedy
