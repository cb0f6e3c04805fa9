"""Cost of saving for a training step: without saves, with synchronous and with background saves.

All ways run in one process, interleaved in random order. The model is a stack of square layers under AdamW,
whose weights and moments are saved; every round trains a number of steps and saves once.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recipes.checkpoint import Retention, Saver, load_checkpoint

NONE, SYNC, ASYNC = "no saves", "synchronous", "asynchronous"
WAYS = (NONE, SYNC, ASYNC)


@dataclass(frozen=True)
class SaveShape:
    """Model that is trained and saved.

    Attributes:
        width: Width of the square layers.
        layers: Number of layers.
        batch: Rows of a step.
        steps: Steps of a round, which has one save.
    """

    width: int = 1024
    layers: int = 8
    batch: int = 256
    steps: int = 20


@dataclass
class SaveFigures:
    """Seconds of one way of saving, by round.

    Attributes:
        steps: Mean of the round's steps, including the save.
        stalls: Seconds that training waited for the save.
        saves: Seconds of the whole save.
    """

    steps: list[float] = field(default_factory=list)
    stalls: list[float] = field(default_factory=list)
    saves: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Returns medians, and the first and last decile of the steps."""
        ordered = sorted(self.steps)
        return {
            "rounds": len(ordered),
            "step_s": statistics.median(ordered),
            "step_p10_s": ordered[len(ordered) // 10],
            "step_p90_s": ordered[-1 - len(ordered) // 10],
            "stall_s": statistics.median(self.stalls) if self.stalls else 0.0,
            "stall_max_s": max(self.stalls, default=0.0),
            "save_s": statistics.median(self.saves) if self.saves else 0.0,
        }


class _Training:
    """The model, its optimizer, and what a checkpoint of them holds."""

    def __init__(self, shape: SaveShape) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(shape.width, shape.width) for _ in range(shape.layers)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.x_TD = torch.randn(shape.batch, shape.width)

    def step(self) -> None:
        self.model(self.x_TD).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = dict(self.model.state_dict())
        for name, parameter in self.model.named_parameters():
            found |= {f"optim.{name}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        return found


def measure_saves(
    shape: SaveShape, rounds: int, folder: Path, log: Callable[[str], None]
) -> tuple[dict[str, SaveFigures], int]:
    """Times all ways of saving.

    Args:
        shape: Shape of the model.
        rounds: Rounds of each, after a warm-up round.
        folder: Folder for the checkpoints, on the disk to measure.
        log: Takes a line for every round.

    Returns:
        Figures by way of saving, and the bytes of a checkpoint.

    Raises:
        AssertionError: A checkpoint does not hold what was there when its save began.
    """
    training = _Training(shape)
    training.step()
    savers = {way: Saver(folder / way, Retention(1), background=way == ASYNC) for way in (SYNC, ASYNC)}
    figures = {way: SaveFigures() for way in WAYS}
    draw = random.Random(0)
    for number in range(rounds + 1):
        for way in draw.sample(WAYS, len(WAYS)):
            _round(training, shape.steps, savers.get(way), number, figures[way] if number else SaveFigures())
        if number:
            log(f"round {number}: " + ", ".join(f"{r} {1e3 * figures[r].steps[-1]:.1f} ms" for r in WAYS))
    for way in (SYNC, ASYNC):
        _check(training, savers[way], folder / way)
    return figures, sum(tensor.nbytes for tensor in training.tensors().values())


def _round(training: _Training, steps: int, saver: Saver | None, number: int, into: SaveFigures) -> None:
    """Runs steps with one save at their start; a save that outlasts the round is awaited and counted."""
    began = time.perf_counter()
    stall = 0.0
    if saver is not None:
        saver.save(number, training.tensors(), {}, {})
        stall = saver.figures()["save_stall_s"] if saver else 0.0
    for _ in range(steps):
        training.step()
    if saver is not None:
        waits = time.perf_counter()
        saver.settle()
        stall += time.perf_counter() - waits
        into.stalls.append(stall)
    into.steps.append((time.perf_counter() - began) / steps)
    if saver is not None:
        into.saves.append(saver.figures().get("save_s", stall))


def _check(training: _Training, saver: Saver, folder: Path) -> None:
    """Checks that a checkpoint holds the state at the start of its save, although training continued."""
    wanted = {name: tensor.clone() for name, tensor in training.tensors().items()}
    saver.save(10**6, training.tensors(), {}, {})
    training.step()
    saver.settle()
    found = {name: torch.empty_like(tensor) for name, tensor in wanted.items()}
    load_checkpoint(folder / f"step-{10**6:08d}", found)
    different = [name for name in wanted if not torch.equal(wanted[name], found[name])]
    assert not different, f"{folder} holds something else than was saved: {different[:5]}"
