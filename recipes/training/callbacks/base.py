"""What may be hooked into the training loop without touching it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moe.metrics import LoadReport


@dataclass(frozen=True)
class StageInfo:
    """One model's training within a run.

    Attributes:
        name: ``dense``, ``moe`` or ``cpt``; the key of its rows in ``metrics.jsonl``.
        title: For people.
        total_steps: Optimizer steps of the whole leg.
        first_step: Steps already done when it starts (resumed).
        tokens_per_step: Over all ranks.
    """

    name: str
    title: str
    total_steps: int
    first_step: int
    tokens_per_step: int


class Callback:
    """Hooks of the loop; called on every rank, with figures already reduced over the ranks."""

    def on_stage_start(self, stage: StageInfo) -> None:
        """Before the first step."""

    def on_row(self, stage: StageInfo, row: Mapping[str, float], load: LoadReport | None) -> None:
        """A step is done (or step 0 was validated); ``row`` holds its figures."""

    def before_checkpoint(self, stage: StageInfo, step: int) -> None:
        """A checkpoint of this step is about to be saved."""

    def on_stage_end(self, stage: StageInfo) -> None:
        """After the last step, also when the run stops early."""
