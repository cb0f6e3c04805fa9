"""Job that trains an MoE model from scratch, and the dense model of its shape on the same tokens."""

from __future__ import annotations

from moe.errors import Mistake
from recipes.config.schema import RunConfig
from recipes.jobs.upcycle_job import UpcycleJob


class PretrainJob(UpcycleJob):
    """Stages of the upcycling job on weights as they were drawn."""

    name = "pretrain"
    needs_weights = "there are no trained weights that factors could stand beside"

    def check_options(self, config: RunConfig, world_size: int) -> list[Mistake]:
        """Checks that nothing was trained before."""
        mistakes = super().check_options(config, world_size)
        if config.dense is not None:
            remedy = "Leave dense out and give the shape by model.*, or use +recipe=upcycle."
            mistakes.append(Mistake("dense", config.dense, "pretraining starts from scratch", remedy))
        if config.model.steps:
            rule = "pretraining trains no dense model first"
            mistakes.append(Mistake("model.steps", config.model.steps, rule, "Set it to 0."))
        return mistakes
