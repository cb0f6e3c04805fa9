"""One model's training within a run: what it takes, and how it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes.config.schema import TrainConfig
from recipes.data.build_data import TrainData
from recipes.engines import TrainModule
from recipes.engines.optim.optimizer import OptimConfig
from recipes.tracking.step_costs import Costs, StepCosts


@dataclass
class Stage:
    """One model's training within a run.

    Attributes:
        name: ``dense``, ``moe`` or ``cpt``.
        title: For people.
        train: Steps, batch and intervals.
        optim: Optimizer and schedule.
        data: Samples.
        train_module: The model under its engine.
        costs: What a token costs, at the end where that changes.
        scheduled_costs: What it costs from each of these steps on, ascending from 0; empty where that is
            ``costs`` throughout.
        step_costs: What the sparsity-aware figures need; None to leave them out.
        checkpoints: Folder of its checkpoints.
        state: What every checkpoint carries besides tensors: identity of the run, reports.
        first_step: Steps done already.
        first_sample: The sample that step 0 begins with: past those that the model was trained on before.
        seed: Of dropout and the like; each rank has its own, and a resumed leg goes on with what was saved.
    """

    name: str
    title: str
    train: TrainConfig
    optim: OptimConfig
    data: TrainData
    train_module: TrainModule
    costs: Costs
    checkpoints: Path
    state: dict[str, Any] = field(default_factory=dict)
    scheduled_costs: Sequence[tuple[int, Costs]] = ()
    step_costs: StepCosts | None = None
    first_step: int = 0
    first_sample: int = 0
    seed: int = 0

    @property
    def tokens_per_step(self) -> int:
        """Over all ranks."""
        return self.train.global_batch_size * self.data.train.seq_len

    def costs_at(self, step: int) -> Costs:
        """What a token costs in a step that has so many before it."""
        begun = [costs for start, costs in self.scheduled_costs if start <= step]
        return begun[-1] if begun else self.costs


@dataclass
class StageResult:
    """How a leg ended.

    Attributes:
        finished: Whether all steps were done; False when it was asked to stop.
        step: Steps done.
        val_loss: Of the last validation.
        first_val_loss: Of the validation before the first step; None when resumed past it.
        tokens_per_s: Median over the steps of this process.
        missing: Figures that no row has, and why.
    """

    finished: bool
    step: int
    val_loss: float | None
    first_val_loss: float | None
    tokens_per_s: float | None
    missing: dict[str, str] = field(default_factory=dict)
