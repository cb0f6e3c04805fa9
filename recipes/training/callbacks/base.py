"""Callbacks of the training loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moe.metrics import LoadReport


@dataclass(frozen=True)
class StageInfo:
    """Description of a stage for callbacks.

    Attributes:
        name: ``dense``, ``moe`` or ``cpt``; the key of its rows in ``metrics.jsonl``.
        title: Title for the console.
        total_steps: Optimizer steps of the whole stage.
        first_step: Steps that were done before this process started it.
        tokens_per_step: Tokens of a step, over all ranks.
        later: Stages of the run that follow, with their steps; empty where these are not known.
    """

    name: str
    title: str
    total_steps: int
    first_step: int
    tokens_per_step: int
    later: Mapping[str, int] = field(default_factory=dict)


class Callback:
    """Callback of the loop, called on every rank with figures over all ranks."""

    def on_stage_start(self, stage: StageInfo) -> None:
        """Acts before the first step."""

    def on_row(self, stage: StageInfo, row: Mapping[str, float], load: LoadReport | None) -> None:
        """Takes the figures of a step that is done, or of the validation before the first step."""

    def before_checkpoint(self, stage: StageInfo, step: int) -> None:
        """Acts before a checkpoint is saved."""

    def on_stage_end(self, stage: StageInfo) -> None:
        """Acts after the last step, also if the run stops early."""
