"""Recorder of every row of the loop, in the run's files and charts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe.metrics import LoadReport
from recipes.runtime.clock import steady_time
from recipes.tracking.goodput import GoodputLedger
from recipes.tracking.trackers import ExpertLoad, RunLogger
from recipes.training.callbacks.base import Callback, StageInfo


class Recorder(Callback):
    """Callback that writes ``metrics.jsonl`` and ``load.jsonl`` first, and then to the tracker."""

    def __init__(self, logger: RunLogger, ledger: GoodputLedger | None = None) -> None:
        """Takes a ``ledger`` on the rank that writes."""
        self.logger = logger
        self.ledger = ledger

    def on_stage_start(self, stage: StageInfo) -> None:
        """Drops the rows behind the resumed checkpoint, which will be written again."""
        dropped = self.logger.truncate_after(stage.name, stage.first_step if stage.first_step else -1)
        if self.ledger is not None and dropped:
            self.ledger.recount()

    def on_row(self, stage: StageInfo, row: Mapping[str, float], load: LoadReport | None) -> None:
        """Writes the row."""
        experts = None if load is None else ExpertLoad(load.layers, load.load)
        now = steady_time() if self.ledger is None else self.ledger.now()
        line: dict[str, Any] = {"stage": stage.name, **row, "time": now}
        if self.ledger is not None and "step_s" in row:
            self.ledger.add_step(row["step_s"], counts="skipped" not in row)
            line["goodput"] = self.ledger.goodput(now)
            if (recovery := self.ledger.recovery(now)) is not None:
                line["recovery_s"] = recovery
        self.logger.log(line, experts)
        if self.ledger is not None and "went_back_to" in row:
            self.ledger.recount()

    def before_checkpoint(self, stage: StageInfo, step: int) -> None:
        """Flushes the rows to disk before the checkpoint: a resume counts on them."""
        self.logger.sync()
