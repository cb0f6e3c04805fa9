"""Hooks around the steps of a stage: what they see of a step, and when they are called."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recipes.runtime.heartbeat import ASIDE, Heartbeat

if TYPE_CHECKING:
    from moe.metrics import LoadReport
    from recipes.engines.base import Engine
    from recipes.tracking.metrics_log import Metric
    from recipes.tracking.run_meters import RunMeters
    from recipes.training.stage import Stage, StageResult


@dataclass
class TrainStep:
    """Optimizer step, filled in as it proceeds.

    Attributes:
        number: Steps before it.
        started: ``time.perf_counter()`` at its beginning.
        losses: Losses of this rank's micro-batches.
        samples: First sample and number of samples of each of them.
        reduced: Measures over all ranks, known before the update.
        norm_limit: Largest gradient norm that may update.
        grad_norm: Norm of the gradient over all ranks.
        load: Load of the MoE layers; None without such layers.
        attention: Load of the layers of attention experts; None without such layers.
        seconds: Duration.
        row: Figures over all ranks, for the metrics log.
        last: Whether the process trains no further step of the stage.
    """

    number: int
    started: float = field(default_factory=time.perf_counter)
    losses: list[Tensor] = field(default_factory=list)
    samples: list[tuple[int, int]] = field(default_factory=list)
    reduced: Mapping[str, float] = field(default_factory=dict)
    norm_limit: float = math.inf
    grad_norm: float = math.nan
    load: LoadReport | None = None
    attention: LoadReport | None = None
    seconds: float = math.nan
    row: dict[str, float] = field(default_factory=dict)
    last: bool = False

    @property
    def done(self) -> int:
        """Steps that are done after this one."""
        return self.number + 1


class Pauses:
    """Account of work between steps, whose time and energy are not those of the steps.

    Attributes:
        spent: Seconds of this process by kind of work.
    """

    def __init__(self, heartbeat: Heartbeat, meters: RunMeters | None) -> None:
        self.spent = {"evaluation": 0.0, "saving": 0.0, "going_back": 0.0}
        self.heartbeat = heartbeat
        self._meters = meters

    @contextlib.contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        """While open, training pauses for work of a kind."""
        self.heartbeat.beat(kind, ASIDE)
        started = time.perf_counter()
        yield
        self.spent[kind] += time.perf_counter() - started
        if self._meters is not None:
            self._meters.between()


@dataclass(frozen=True)
class StageContext:
    """Stage in training, as its hooks see it.

    Attributes:
        engine: The engine of the run.
        stage: The stage.
        result: Its result so far.
        pauses: Account of the work between steps.
    """

    engine: Engine[Any]
    stage: Stage
    result: StageResult
    pauses: Pauses


class StepHook:
    """Part of the training of a stage. Each method is called on every rank, in the order of this class.

    Attributes:
        run: The stage in training.
    """

    def __init__(self, run: StageContext) -> None:
        self.run = run

    def at_start(self) -> None:
        """Acts before the first step of this process."""

    def before_step(self, step: TrainStep) -> None:
        """Acts before the forward passes."""

    def after_gradients(self, step: TrainStep) -> dict[str, Metric]:
        """Returns measures that all ranks must share before the update."""
        return {}

    def before_update(self, step: TrainStep) -> None:
        """Acts on the shared measures, e.g. by setting `TrainStep.norm_limit`."""

    def after_update(self, step: TrainStep) -> None:
        """Acts right after the update, within the time of the step."""

    def figures(self, step: TrainStep) -> dict[str, float]:
        """Returns figures for the row of the step, once its duration is known."""
        return {}

    def after_step(self, step: TrainStep) -> None:
        """Acts between steps, before the row is published."""

    def after_row(self, step: TrainStep) -> None:
        """Acts between steps, after the row is published."""

    def at_end(self) -> None:
        """Acts after the last step, unless an error ends the stage."""


def is_due(step: int, every: int) -> bool:
    """Returns whether work with an interval of ``every`` steps (0: never) is due after this step."""
    return every > 0 and step % every == 0


def get_rng(device: torch.device) -> dict[str, Tensor]:
    """Returns the random states of this rank."""
    states = {"rng_cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["rng_cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_rng(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Sets the random states of this rank to what `get_rng` returned."""
    torch.set_rng_state(states["rng_cpu"])
    if device.type == "cuda" and "rng_cuda" in states:
        torch.cuda.set_rng_state(states["rng_cuda"], device)
