"""Shares of a blend's sources in what a stage has trained on."""

from __future__ import annotations

from recipes.data.blend import BlendedSamples
from recipes.training.hooks.base import StepHook, TrainStep


class BlendShares(StepHook):
    """Writes ``blend/NAME``, the share of each source in the samples of the stage so far."""

    def after_step(self, step: TrainStep) -> None:
        """Adds the shares to the row."""
        stage, train = self.run.stage, self.run.stage.data.train
        if not isinstance(train, BlendedSamples):
            return
        count = step.done * stage.train.global_batch_size
        for source, drawn in zip(stage.data.sources, train.drawn(stage.first_sample, count), strict=True):
            step.row[f"blend/{source.name}"] = float(drawn) / count
