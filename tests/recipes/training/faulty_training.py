"""Trains a tiny mixture in which steps go wrong, on one rank of several, as a test says.

One process runs many cases: to start it takes longer than to train.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.dispatch.local import LocalDispatcher
from moe.errors import GraftError
from moe.metrics import LoadReport
from moe.routers.configs.deepseek_v3_config import DeepSeekV3Config
from moe.routers.deepseek_v3 import DeepSeekV3Router
from moe.upcycle.configs.copies_config import CopyConfig
from moe.upcycle.copies import Copy
from recipes.checkpoint import find_checkpoint
from recipes.engines.micro_batch import MicroBatch
from recipes.engines.native.native_engine import NativeTrainModule
from recipes.engines.optim.config import OptimConfig
from recipes.engines.optim.lr_schedule import ScheduleConfig
from recipes.engines.optim.muon import local_part
from recipes.models.hf.hf_model import HFModel
from recipes.runtime.config import FaultsConfig
from recipes.runtime.interrupt import StopRequest
from recipes.training.callbacks.base import Callback, StageInfo
from recipes.training.guards.run_guards import RunGuards
from recipes.training.stage import StageResult
from recipes.training.training_loop import Loop
from tests.conftest import random_model
from tests.recipes.engines.engine_cases import EXPERTS, VOCABULARY, Case, full, make_stage, open_engine
from tests.recipes.models.whole_surgery import Surgery, swap

FAULTY_RANK = 1
BIAS_RATE = 0.01
_ADAMW = OptimConfig(lr=3e-3, schedule=ScheduleConfig("cosine", warmup_steps=2))
# Faults: what the step of this number (from 0) meets on the faulty rank, or on all of them.
Faults = Mapping[int, str]


@dataclass(frozen=True)
class Story:
    """A training and what goes wrong in it.

    Attributes:
        faults: By step.
        steps: Optimizer steps.
        save_every: Steps between checkpoints.
        engine: Fields of `NativeConfig`.
        guards: When steps are skipped and the run ends.
        heals: After the error that ends it the run goes on without faults.
        stop_at: The run is asked to stop in the step after this one, and goes on from its checkpoint.
        equal: Whether the router has no preference: then half of the experts get no token.
        dropout: Of attention, drawn from the random state that checkpoints carry.
    """

    faults: Faults = field(default_factory=dict)
    steps: int = 6
    save_every: int = 2
    engine: dict[str, Any] = field(default_factory=dict)
    guards: FaultsConfig = field(default_factory=FaultsConfig)
    heals: bool = False
    stop_at: int | None = None
    equal: bool = False
    dropout: float = 0.1


@dataclass
class Told:
    """What came of it on a rank.

    Attributes:
        rows: By step.
        weights: Model in full behind every step, by the number of steps done.
        state: Optimizer and router state behind the last step: this rank's part.
        error: The error that ended it: class and text.
        saved: Steps of the checkpoints at the end.
        written: What was written down of bad batches, by file name.
        said: What the rank printed.
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    weights: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    error: tuple[str, str] | None = None
    saved: list[int] = field(default_factory=list)
    written: dict[str, Any] = field(default_factory=dict)
    said: str = ""


class _Recorder(Callback):
    def __init__(self, told: Told, train_module: NativeTrainModule, stop: StopRequest) -> None:
        self.told, self.train_module, self.stop = told, train_module, stop
        self.stop_at: int | None = None

    def on_row(self, stage: StageInfo, row: Mapping[str, float], load: LoadReport | None) -> None:
        self.told.rows.append(dict(row))
        step = int(row["step"])
        self.told.weights[step] = {name: full(t) for name, t in self.train_module.full_tensors()}
        self.stop.requested = self.stop_at == step


def _model(story: Story) -> HFModel:
    """The same weights in every process; a router with state of its own, kept between steps."""
    small = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "attention_dropout": story.dropout}
    model = HFModel(random_model("llama", **small), Path(), torch.float32)
    config = DeepSeekV3Config(init_std=0.3, bias_rate=BIAS_RATE, balance_coef=0.1)
    surgery = Surgery(
        method=Copy(CopyConfig(num_experts=EXPERTS, noise_std=0.5)),
        make_router=lambda width, experts: DeepSeekV3Router(config, width, experts),
        make_dispatcher=LocalDispatcher,
        backend="auto",
        seed=0,
    )
    swap(model, surgery)
    if story.equal:
        for _, layer in model.moe_layers():
            layer.router.weight_ED.data.zero_()
    return model


def poison(train_module: NativeTrainModule, rank: int, faults: Faults) -> None:
    """Makes steps go wrong by the number of the step."""
    losses, forward_backward = train_module._losses, train_module.forward_backward

    def kind(of: str, everywhere: bool = False) -> bool:
        return faults.get(train_module.model.context.step) == of and (everywhere or rank == FAULTY_RANK)

    def poisoned_losses(batch: MicroBatch) -> Tensor:
        found = losses(batch)
        if not torch.is_grad_enabled():
            return found
        for name, factor in (("nan_loss", math.nan), ("inf_loss", math.inf), ("spike", 1e3), ("higher", 1e6)):
            found = found * factor if kind(name) else found
        return found

    def poisoned(batches: Sequence[MicroBatch]) -> list[Tensor]:
        found = forward_backward(batches)
        if kind("inf_loss_finite_gradient"):
            return [torch.full_like(loss, math.inf) for loss in found]
        for name, value in (("nan_gradient", math.nan), ("inf_gradient", math.inf)):
            if kind(name):
                grads = [p.grad for p in train_module.model.module.parameters() if p.grad is not None]
                parts = [part for part in map(local_part, grads) if part.numel()]
                parts[len(parts) // 2].view(-1)[0] = value
        return found

    train_module._losses = poisoned_losses  # type: ignore[method-assign]
    train_module.forward_backward = poisoned  # type: ignore[method-assign]


def _stage(story: Story, folder: Path, told: Told, stop_at: int | None) -> None:
    engine = open_engine(**story.engine)
    train_module = engine.prepare(_model(story), _ADAMW)
    poison(train_module, engine.rank, story.faults)
    case = Case(optim=_ADAMW, steps=story.steps, micro=2)
    stage = make_stage(case, train_module, folder / "checkpoints")
    stage.train = replace(stage.train, save_every=story.save_every, eval_every=0, keep_last=None)
    stop = StopRequest()
    recorder = _Recorder(told, train_module, stop)
    recorder.stop_at = stop_at
    loop = Loop(engine, [recorder], stop, guards=RunGuards(story.guards, folder))
    found = find_checkpoint(stage.checkpoints)
    if found.path is not None:
        stage.state |= loop.resume(stage, found.path)
    try:
        result: StageResult | None = loop.run(stage)
    except GraftError as error:
        result, told.error = None, (type(error).__name__, str(error))
    engine.barrier()
    told.state = {name: local_part(t).clone() for name, t in train_module.checkpoint_tensors().items()}
    if result is not None and stop_at is not None:
        assert not result.finished, "it was asked to stop"


def _tell(story: Story, folder: Path) -> Told:
    told, out = Told(), io.StringIO()
    with contextlib.redirect_stdout(out):
        if story.stop_at is not None:
            _stage(story, folder, told, story.stop_at)
        _stage(story, folder, told, None)
        if story.heals:
            _stage(replace(story, faults={}), folder, told, None)
    told.said = out.getvalue()
    told.saved = sorted(
        int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*")
    )
    told.written = {
        path.name: json.loads(path.read_text()) for path in sorted((folder / "faults").glob("*.json"))
    }
    return told


def tell_all(rank: int, world_size: int, folder: str, stories: dict[str, Story]) -> dict[str, Told]:
    """For `run_ranks`: all stories, one after the other."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    told = {}
    for name, story in stories.items():
        place = Path(folder) / name
        told[name] = _tell(story, place)
        torch.distributed.barrier()
        if rank == 0:
            shutil.rmtree(place)
        torch.distributed.barrier()
    return told
