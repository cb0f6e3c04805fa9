"""Puts every row of the loop into the run's files and charts."""

from __future__ import annotations

import time
from collections.abc import Mapping

from moe.stats import LoadReport
from recipes.callbacks.base import Callback, LegInfo
from recipes.tracking import ExpertLoad, RunLogger


class Recorder(Callback):
    """Writes ``metrics.jsonl`` and ``load.jsonl`` first, then the tracker."""

    def __init__(self, logger: RunLogger) -> None:
        self.logger = logger

    def on_leg_start(self, leg: LegInfo) -> None:
        """Drops rows past the checkpoint that is resumed: they are written again."""
        self.logger.truncate_after(leg.name, leg.first_step if leg.first_step else -1)

    def on_row(self, leg: LegInfo, row: Mapping[str, float], load: LoadReport | None) -> None:
        """Writes the row."""
        experts = None if load is None else ExpertLoad(load.layers, load.load)
        self.logger.log({"leg": leg.name, **row, "time": time.time()}, experts)

    def before_checkpoint(self, leg: LegInfo, step: int) -> None:
        """The rows up to a checkpoint are on the disk before it is: a resume counts on them."""
        self.logger.sync()
