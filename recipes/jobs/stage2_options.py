"""Options of the second stage of the job `two_stage`."""

from __future__ import annotations

import dataclasses

from recipes.config.schema import RunConfig
from recipes.config.sections.stage2_config import Stage2Config
from recipes.engines.optim.config import FrozenConfig

#: Name of the first stage; the second gives the run's model, and has the name of that.
FIRST = "stage1"


def stage2_config(config: RunConfig) -> RunConfig:
    """Returns the config of the second stage: experts a token as the first ended with, nothing frozen."""
    stage = config.section(Stage2Config)
    schedule = dataclasses.replace(config.optim.schedule, warmup_steps=stage.warmup_steps)
    return dataclasses.replace(
        config,
        data=config.data.of(stage.path, stage.validation_path),
        train=dataclasses.replace(config.train, steps=stage.steps),
        optim=dataclasses.replace(config.optim, lr=stage.lr, schedule=schedule, frozen=FrozenConfig()),
        top_k_schedule=[],
    )
