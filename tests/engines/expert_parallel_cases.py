"""Trainings with spread experts, and checkpoints that one layout writes and another reads.

A layout is ``(ranks, expert_parallel)``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from recipes.checkpoint import load_checkpoint, save_checkpoint
from recipes.engines.native import NativeTrainable
from tests.engines import engine_cases
from tests.engines.case_list import ALONE
from tests.engines.engine_cases import GLOBAL_BATCH, Case, Outcome, full, make_host, open_engine, run_cases
from tests.engines.engine_cases import tokens as samples

Layout = tuple[int, int]
# One rank trains every case; how many experts there are where it is not four.
NAMES = ("fsdp", "fsdp_recomputing", "adamw", "muon", "clipped", "one_expert", "biases", "bf16")
FEW = {"two_experts": 2}
TRAINED: dict[Layout, tuple[str, ...]] = {
    (1, 1): (*NAMES, "two_experts"),
    (2, 2): NAMES[1:],
    (4, 2): ("fsdp_recomputing", "two_experts"),
    (4, 4): ("fsdp_recomputing",),
}
# After these many steps a checkpoint is written, and one more step is done.
SAVED = 2


@dataclass
class Found:
    """What the ranks of one start have found.

    Attributes:
        trained: By expert_parallel and case.
        written: Weights after the step behind the checkpoint, by the layout that wrote it.
        read: The same, by the layout that wrote the checkpoint and the expert_parallel that went on from it.
        refused: Whether a gradient that is not finite on one rank updated nothing on this one.
    """

    trained: dict[int, dict[str, Outcome]] = field(default_factory=dict)
    written: dict[Layout, dict[str, Tensor]] = field(default_factory=dict)
    read: dict[tuple[Layout, int], dict[str, Tensor]] = field(default_factory=dict)
    refused: bool | None = None


def work(rank: int, world_size: int, folder: str, reads: list[tuple[Layout, int]], trains: bool) -> Found:
    """For `run_ranks`: what so many ranks train, write and read."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    found = Found()
    layouts = [layout for layout in TRAINED if layout[0] == world_size] if trains else []
    for _, spread in layouts:
        found.trained[spread] = _train(rank, world_size, spread)
        found.written[world_size, spread] = _write(Path(folder), (world_size, spread))
    for source, spread in reads:
        found.read[source, spread] = _read(Path(folder), source, spread)
    if trains and world_size == 2:
        found.refused = _refuses(rank)
    return found


def _case(name: str, world_size: int, spread: int) -> Case:
    case = ALONE["muon" if name in FEW else name]
    return replace(case, micro=case.micro // world_size, engine=case.engine | {"expert_parallel": spread})


def _train(rank: int, world_size: int, spread: int) -> dict[str, Outcome]:
    names = TRAINED[world_size, spread]
    done = run_cases(rank, world_size, {n: _case(n, world_size, spread) for n in names if n not in FEW})
    for name in set(names) & set(FEW):
        with patch.object(engine_cases, "EXPERTS", FEW[name]):
            done |= run_cases(rank, world_size, {name: _case(name, world_size, spread)})
    return done


def _prepared(spread: int, recomputes: bool = False) -> NativeTrainable:
    case = ALONE["adamw"]
    engine = open_engine(expert_parallel=spread, activation_checkpointing=recomputes)
    return engine.prepare(make_host(case), case.optim)


def _step(trainable: NativeTrainable, step: int) -> Tensor:
    engine = trainable.engine
    share = GLOBAL_BATCH // engine.world_size
    batch = samples(step * GLOBAL_BATCH + engine.rank * share, share)
    trainable.forward_backward(torch.from_numpy(batch), 0, 1)
    return trainable.step(1.0)


def _weights(trainable: NativeTrainable) -> dict[str, Tensor]:
    return {name: full(tensor) for name, tensor in trainable.full_tensors()}


def _write(folder: Path, layout: Layout) -> dict[str, Tensor]:
    trainable = _prepared(layout[1])
    for step in range(SAVED):
        _step(trainable, step)
    save_checkpoint(_place(folder, layout), SAVED, trainable.checkpoint_tensors(), {})
    _step(trainable, SAVED)
    return _weights(trainable)


def _read(folder: Path, source: Layout, spread: int) -> dict[str, Tensor]:
    # Recomputation ends here where it ends by default: after the last tensor that backward needs.
    trainable = _prepared(spread, recomputes=True)
    tensors: dict[str, Any] = trainable.checkpoint_tensors()
    for tensor in tensors.values():
        tensor.fill_(7)
    load_checkpoint(_place(folder, source) / f"step-{SAVED:08d}", tensors)
    _step(trainable, SAVED)
    return _weights(trainable)


def _place(folder: Path, layout: Layout) -> Path:
    return folder / f"{layout[0]}x{layout[1]}"


def _refuses(rank: int) -> bool:
    trainable = _prepared(2)
    before = _weights(trainable)
    trainable.forward_backward(torch.from_numpy(samples(4 * rank, 4)), 0, 1)
    if rank == 1:
        grad = trainable.host.moe_layers()[0][1].experts.w_up_EUD.grad
        grad.to_local().flatten()[0] = float("nan")
    norm = trainable.step(1.0)
    after = _weights(trainable)
    return not bool(torch.isfinite(norm)) and all(torch.equal(after[name], before[name]) for name in before)
