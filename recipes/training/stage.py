"""Stages of a run, each the training of one model, and their results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.checkpoint import Origin

if TYPE_CHECKING:
    from recipes.config.schema import TrainConfig
    from recipes.data.build_data import TrainData
    from recipes.engines.base import TrainModule
    from recipes.engines.optim.config import OptimConfig
    from recipes.tracking.step_costs import Costs, StepCosts


@dataclass
class Stage:
    """Training of one model within a run.

    Attributes:
        name: ``dense``, ``moe`` or ``cpt``.
        title: Title for the console.
        train: Steps, batch and intervals.
        optim: Optimizer and schedule.
        data: Samples.
        train_module: The model as its engine has prepared it.
        costs: Costs of a token; those at the end if they change.
        scheduled_costs: Costs of a token from each of these steps on, ascending from 0; empty if they do not
            change.
        step_costs: Inputs of the sparsity-aware figures; None leaves these out.
        checkpoints: Folder of its checkpoints.
        origin: Run that they belong to, and what it went on from.
        state: State that every checkpoint has besides tensors: identity of the run, reports.
        first_step: Steps done already.
        first_sample: First sample of step 0, behind those that the model was trained on before.
        seed: Seed of dropout and other noise. Each rank adds its number; a resumed stage continues from its
            saved random states.
    """

    name: str
    title: str
    train: TrainConfig
    optim: OptimConfig
    data: TrainData
    train_module: TrainModule
    costs: Costs
    checkpoints: Path
    origin: Origin = Origin()
    state: dict[str, Any] = field(default_factory=dict)
    scheduled_costs: Sequence[tuple[int, Costs]] = ()
    step_costs: StepCosts | None = None
    first_step: int = 0
    first_sample: int = 0
    seed: int = 0

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step, over all ranks."""
        return self.train.global_batch_size * self.data.train.seq_len

    def costs_at(self, step: int) -> Costs:
        """Returns the costs of a token in the step that follows ``step`` others."""
        begun = [costs for start, costs in self.scheduled_costs if start <= step]
        return begun[-1] if begun else self.costs


@dataclass
class StageResult:
    """Result of a stage.

    Attributes:
        finished: Whether all steps were done; False if a stop was requested.
        step: Steps done.
        val_loss: Loss of the last validation.
        first_val_loss: Loss of the validation before the first step; None if not known.
        tokens_per_s: Median over the steps of this process.
        val_losses: Losses of the last validation of this process by the name of their metric.
        missing: Reasons by the name of figures that no row has.
    """

    finished: bool
    step: int
    val_loss: float | None
    first_val_loss: float | None
    tokens_per_s: float | None
    val_losses: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
