"""Trains tiny MoE models under DeepSpeed and under the native engine, each layout on ranks of its own.

A layout is ``(ranks, zero_stage, expert_parallel)``; the native engine's, which has no stage, has None there.
"""

from __future__ import annotations

import gc
import tempfile
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from recipes.checkpoint import load_checkpoint, save_checkpoint
from recipes.engines.base import TrainModule
from recipes.engines.deepspeed.deepspeed_engine import DeepSpeedConfig, DeepSpeedEngine, DeepSpeedTrainModule
from recipes.engines.deepspeed.zero_experts import gather_slices
from recipes.engines.micro_batch import MicroBatch
from recipes.engines.optim.config import FrozenConfig, OptimConfig
from recipes.engines.optim.lr_schedule import ScheduleConfig
from recipes.runtime.interrupt import StopRequest
from recipes.training.training_loop import Loop
from tests.recipes.engines import engine_cases
from tests.recipes.engines.case_list import ALONE
from tests.recipes.engines.engine_cases import (
    GLOBAL_BATCH,
    Case,
    Outcome,
    full,
    make_model,
    make_stage,
    open_engine,
)
from tests.recipes.engines.engine_cases import tokens as samples
from tests.shared_runs import Lazily, on_ranks, shared_folder

Layout: TypeAlias = tuple[int, int | None, int]

_CONSTANT = ScheduleConfig("constant", warmup_steps=0)
# Frozen experts, two learning rates, decay and a clip that bites, in two micro-batches with recomputation.
RICH = OptimConfig(
    lr=3e-3,
    # Well above what rounding does to a gradient of 0, which AdamW would blow up.
    eps=1e-4,
    router_lr_scale=2.0,
    clip_norm=0.5,
    frozen=FrozenConfig(steps=1),
    schedule=_CONSTANT,
)
CASES = {
    "plain": Case(micro=4),
    "rich": Case(micro=4, optim=RICH, steps=3, engine={"activation_checkpointing": True}),
    "one_expert": ALONE["one_expert"],
    "dead_experts": ALONE["dead_experts"],
    "biases": ALONE["biases"],
    "attention": ALONE["attention_accumulating"],
    "lora": Case(micro=4, optim=RICH, steps=3, lora=4),
    "bf16": Case(engine={"precision": "bf16"}, steps=2),
}
TRAINED: dict[Layout, tuple[str, ...]] = {
    (1, None, 1): ("plain", "rich"),
    (2, None, 1): tuple(CASES),
    (1, 0, 1): ("plain",),
    (1, 3, 1): ("rich",),
    (2, 0, 1): ("rich",),
    (2, 1, 1): ("rich", "dead_experts", "lora"),
    (2, 2, 1): ("rich", "bf16"),
    (2, 3, 1): ("rich", "attention", "lora"),
    (2, 0, 2): ("plain",),
    (2, 1, 2): ("one_expert",),
    (2, 2, 2): ("rich", "biases", "lora"),
    (2, 3, 2): ("plain", "rich", "one_expert", "dead_experts", "bf16"),
}
# After these many steps a checkpoint is written, and one more step is done.
SAVED = 2
# Who writes, and who goes on from it.
READS: dict[Layout, tuple[Layout, ...]] = {
    (2, None, 1): ((2, 1, 1), (2, 3, 2), (2, 0, 2), (1, 2, 1)),
    (2, 2, 1): ((2, None, 2), (2, 3, 1), (1, 3, 1)),
    (2, 3, 2): ((2, None, 1), (2, 1, 2), (1, None, 1)),
    (2, 0, 2): ((2, 2, 1),),
}
REFUSED: tuple[Layout, ...] = ((2, 2, 2), (2, 3, 2))
FREED: tuple[Layout, ...] = ((1, 2, 1), (1, 3, 1))
STEPS = 25
LONG: tuple[Layout, ...] = ((2, None, 1), (2, 1, 1), (2, 2, 2), (2, 3, 2))


@dataclass(frozen=True)
class Found:
    """What a rank finds; each part is run when it is first asked for.

    Attributes:
        world_size: Number of ranks that were started.
        rank: Which of them this is.
    """

    world_size: int
    rank: int

    def _of(self, fn: Callable[..., Any], *args: Any) -> Any:
        return on_ranks(self.world_size, fn, *args)[self.rank]

    @property
    def trained(self) -> Mapping[Layout, dict[str, Outcome]]:
        """By layout and case."""
        layouts = [layout for layout in TRAINED if layout[0] == self.world_size]
        return Lazily(layouts, lambda layout: self._of(train_all, layout))

    @property
    def written(self) -> Mapping[Layout, dict[str, Tensor]]:
        """Weights after the step behind the checkpoint, by the layout that wrote it."""
        return Lazily(READS, lambda layout: self._of(_write, shared_folder("deepspeed"), layout))

    @property
    def read(self) -> Mapping[tuple[Layout, Layout], dict[str, Tensor]]:
        """The same, by the layout that wrote the checkpoint and the one that went on from it."""

        def read(pair: tuple[Layout, Layout]) -> dict[str, Tensor]:
            assert found()[pair[0][0]][0].written[pair[0]]
            return self._of(_read, shared_folder("deepspeed"), *pair)

        return Lazily([(source, layout) for source in READS for layout in READS[source]], read)

    @property
    def refused(self) -> dict[Layout, tuple[bool, float]]:
        """Whether a loss that is not finite on one rank, and a norm above the limit, updated nothing here.

        By layout; and by how much the step after them differs from one without them.
        """
        return {layout: self._of(_refuses, layout) for layout in REFUSED}

    @property
    def series(self) -> dict[Layout, list[float]]:
        """Losses by layout."""
        return {layout: self._of(series, layout, STEPS) for layout in LONG}

    @property
    def freed(self) -> dict[Layout, bool]:
        """By layout, whether a model that nobody uses any more has given its memory back."""
        return {layout: self._of(_frees, layout) for layout in FREED}


def found() -> dict[int, list[Found]]:
    """By number of ranks, of every rank."""
    return {world: [Found(world, rank) for rank in range(world)] for world in (1, 2)}


def train_all(layout: Layout) -> dict[str, Outcome]:
    """Trains every case of a layout."""
    return {name: train(CASES[name], layout) for name in TRAINED[layout]}


def prepared(case: Case, layout: Layout) -> Any:
    """A trainable of a layout, on the process group that is open already."""
    ranks, stage, spread = layout
    assert ranks == dist.get_world_size()
    model, more = make_model(case), case.engine | {"expert_parallel": spread}
    if stage is None:
        return open_engine(**more).prepare(model, case.optim)
    config: Any = {"device": "cpu", "threads": 1, "zero_stage": stage} | more
    engine = DeepSpeedEngine(DeepSpeedConfig(**config))
    with patch("torch.distributed.init_process_group"):
        engine.open()
    return engine.prepare(model, case.optim)


def train(case: Case, layout: Layout) -> Outcome:
    """Runs a case on this rank, with as many samples in a micro-batch over all ranks as one rank has."""
    outcome = Outcome()
    train_module = prepared(case, layout)
    _look_before_first_step(train_module, outcome)
    with tempfile.TemporaryDirectory() as folder:
        folder = train_module.engine.broadcast(folder)
        # The native engine's losses, which these are compared with, are computed in one piece.
        case = replace(case, micro=case.micro // layout[0], by_rows=layout[1] is not None)
        stage = make_stage(case, train_module, Path(folder))
        with case.memory():
            Loop(train_module.engine, [engine_cases._Record(outcome)], StopRequest()).run(stage)
        train_module.engine.barrier()
    outcome.weights = weights_of(train_module)
    outcome.notes = {"updates": [layer.context.run.step for layer in train_module.model.routed_layers()]}
    return outcome


def weights_of(train_module: TrainModule) -> dict[str, Tensor]:
    """The model in full."""
    return {name: full(tensor) for name, tensor in train_module.full_tensors()}


def _look_before_first_step(train_module: Any, outcome: Outcome) -> None:
    original = train_module.step

    def step(lr_factor: float, *limit: float) -> Tensor:
        if not outcome.grads:
            outcome.grads = gradients(train_module)
            counts = [
                sum(float(sums[-4]) for sums in layer.stats.sums.values())
                for _, layer in train_module.model.moe_layers()
            ]
            total = torch.tensor(counts)
            dist.all_reduce(total)
            outcome.tokens = total.tolist()
        return original(lr_factor, *limit)

    train_module.step = step


def gradients(train_module: Any) -> dict[str, Tensor]:
    """The gradients of a step in full, by name."""
    named = {name: p for name, p in train_module.model.module.named_parameters() if p.requires_grad}
    if not isinstance(train_module, DeepSpeedTrainModule):
        return {name: full(param.grad) for name, param in named.items()}
    spread = train_module.ep
    if train_module.stage == 0:
        return {
            name: gather_slices(param.grad, spread) if name in spread.counts else full(param.grad)
            for name, param in named.items()
        }
    pieces = []
    for i, partition in enumerate(train_module.partitions):
        flat = torch.cat([grad.flatten() for grad in train_module.wrapped.optimizer.averaged_gradients[i]])
        shards = {run.name: run.shard(flat, spread) for run in partition.runs}
        pieces += [(name, s.global_shape, s.start, s.tensor.clone()) for name, s in shards.items()]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, pieces)
    whole = {name: torch.full(shape, float("nan")) for name, shape, _, _ in pieces}
    for name, _, start, part in (piece for rank in every for piece in rank):
        whole[name].view(-1)[start : start + len(part)] = part
    return {name: whole[name] for name in named}


def take_step(train_module: Any, step: int) -> Tensor:
    """One step of the global batch, in one micro-batch; returns the loss of all ranks."""
    engine = train_module.engine
    share = GLOBAL_BATCH // engine.world_size
    batch = samples(step * GLOBAL_BATCH + engine.rank * share, share)
    loss = train_module.forward_backward([MicroBatch(torch.from_numpy(batch))])[0]
    train_module.step(1.0)
    dist.all_reduce(loss)
    return loss / engine.world_size


def _write(folder: Path, layout: Layout) -> dict[str, Tensor]:
    train_module = prepared(ALONE["adamw"], layout)
    for step in range(SAVED):
        take_step(train_module, step)
    save_checkpoint(_place(folder, layout), SAVED, train_module.checkpoint_tensors(), {})
    take_step(train_module, SAVED)
    return weights_of(train_module)


def _read(folder: Path, source: Layout, layout: Layout) -> dict[str, Tensor]:
    train_module = prepared(ALONE["adamw"], layout)
    # It has trained something else before.
    take_step(train_module, 7)
    load_checkpoint(_place(folder, source) / f"step-{SAVED:08d}", train_module.checkpoint_tensors())
    take_step(train_module, SAVED)
    return weights_of(train_module)


def _place(folder: Path, layout: Layout) -> Path:
    return folder / "x".join(str(part) for part in layout)


def _refuses(layout: Layout) -> tuple[bool, float]:
    train_module, fresh = (prepared(ALONE["adamw"], layout) for _ in range(2))
    before = weights_of(train_module)
    original = train_module._losses
    broken = float("nan") if train_module.engine.rank == 1 else 1.0
    train_module._losses = lambda batch: original(batch) * broken
    share = GLOBAL_BATCH // layout[0]
    train_module.forward_backward(
        [MicroBatch(torch.from_numpy(samples(share * train_module.engine.rank, share)))]
    )
    norm = train_module.step(1.0)
    train_module._losses = original
    # Another that is finite, and above what it may be.
    train_module.forward_backward([MicroBatch(torch.from_numpy(samples(0, share)))])
    limited = train_module.step(1.0, 0.5 * float(train_module.clip_norm or 1.0))
    after = weights_of(train_module)
    held = not bool(torch.isfinite(norm)) and bool(torch.isfinite(limited))
    held &= all(torch.equal(after[name], before[name]) for name in before)
    for other in (train_module, fresh):
        take_step(other, 0)
    wanted, got = weights_of(fresh), weights_of(train_module)
    return held, max(float((got[name] - wanted[name]).abs().max()) for name in wanted)


def _frees(layout: Layout) -> bool:
    train_module = prepared(ALONE["adamw"], layout)
    take_step(train_module, 0)
    model, weights = weakref.ref(train_module.model.module), train_module.partitions[0].weights
    assert weights.untyped_storage().size() > 0
    del train_module
    gc.collect()
    gc.collect()
    return model() is None or weights.untyped_storage().size() == 0


def series(layout: Layout, steps: int) -> list[float]:
    """The losses of so many steps."""
    train_module = prepared(ALONE["adamw"], layout)
    return [float(take_step(train_module, step)) for step in range(steps)]
