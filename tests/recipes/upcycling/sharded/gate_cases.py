"""The step-0 gate on shards, what is trained afterwards, and how a run goes on: for several ranks."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from moe.dispatch.local import LocalDispatcher
from moe.errors import ExactnessError
from moe.routers import router_class
from moe.upcycle import upcycle_methods
from moe.upcycle.configs.copies_config import CopyConfig
from moe.upcycle.configs.drop_config import DropConfig
from recipes.checkpoint import load_checkpoint, save_checkpoint
from recipes.engines.optim.config import OptimConfig
from recipes.models.hf.drift import SurgeryReport
from recipes.models.hf.hf_model import load_model
from recipes.upcycling.convert.conversion_plan import ExpertWork
from recipes.upcycling.convert.moe_plan import MoERequest, plan_moe
from recipes.upcycling.sharded.sharded_check import measure_shards
from recipes.upcycling.sharded.sharded_models import moe_model
from recipes.upcycling.sharded.upcycled_weights import UpcycledWeights
from tests.conftest import VOCABULARY
from tests.recipes.engines.engine_cases import open_engine
from tests.recipes.models.whole_surgery import Surgery, upcycle
from tests.recipes.upcycling.sharded.online_cases import (
    SEED,
    Case,
    differences,
    made_whole,
    plan_of,
)

COPY, DROP = CopyConfig(num_experts=4), DropConfig(num_experts=4)


@dataclass
class Found:
    """What one rank has seen.

    Attributes:
        report: Of the gate on shards.
        whole: The same by the surgery in one memory.
        logits: Largest difference of what is then trained, from the mixture in one memory.
    """

    report: SurgeryReport
    whole: SurgeryReport
    logits: float


def some_tokens() -> Tensor:
    """The same on all ranks."""
    return torch.randint(1, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))


def gate(case: Case) -> Found:
    """Measures a case on shards and in one memory, and prepares it for training."""
    assert case.method is not None
    engine, plan, tokens = open_engine(**case.engine), plan_of(case), some_tokens()
    report, weights = measure_shards(engine, plan, tokens)
    train_module = engine.prepare(moe_model(plan, weights=weights), OptimConfig())
    model = load_model(case.dense)
    surgery = Surgery(
        method=upcycle_methods()[case.method.name](case.method),
        make_router=lambda width, experts: router_class(case.router.name)(case.router, width, experts),
        make_dispatcher=LocalDispatcher,
        backend="auto",
        seed=SEED,
    )
    whole = upcycle(model, surgery, tokens)
    with torch.no_grad():
        wanted = model.module(input_ids=tokens).logits
    return Found(
        report, whole, float((train_module.logits(tokens) - wanted).abs().max() / wanted.abs().max())
    )


def unsupported_reason(case: Case) -> str:
    """What the gate says when a layer's experts come out wrong."""
    make = UpcycledWeights._make_matrices

    def wrong(self: UpcycledWeights, work: ExpertWork, targets: list[Any], draws: Any) -> None:
        make(self, work, targets, draws)
        if work.ffn.layer == 1 and work.matrix == "down":
            targets[-1].view.zero_()

    with patch.object(UpcycledWeights, "_make_matrices", wrong):
        try:
            measure_shards(open_engine(**case.engine), plan_of(case), some_tokens())
        except ExactnessError as error:
            return str(error)
    return "nothing"


def resumed(case: Case) -> list[str]:
    """What differs after a checkpoint has been loaded where nothing dense can be read."""
    assert case.method is not None
    engine = open_engine(**case.engine)
    begun = engine.prepare(moe_model(plan_of(case)), OptimConfig())
    folder = engine.broadcast(tempfile.mkdtemp())
    save_checkpoint(Path(folder), 1, begun.checkpoint_tensors(), {})
    request = MoERequest(case.dense, case.method, case.router, SEED)
    # Sources are not looked for, either.
    with patch(
        "recipes.models.safetensors.dense_files.DenseFiles.__init__", side_effect=AssertionError("read")
    ):
        model = moe_model(plan_moe(request, reads=False))
        train_module = engine.prepare(model, OptimConfig())
        load_checkpoint(Path(folder) / "step-00000001", train_module.checkpoint_tensors())
    return differences(model, made_whole(case, {}))


def measured(dense: Path, gpt2: Path, world_size: int) -> dict[str, Found]:
    """Measures every case of the step-0 check."""
    exact = Case(dense, COPY)
    cases = {
        "exact": exact,
        "inexact": Case(dense, DROP),
        "some layers": Case(gpt2, replace(COPY, layers=[1])),
        "bf16": replace(exact, engine={"precision": "bf16"}),
    }
    if world_size > 1:
        cases["spread"] = Case(dense, DROP, engine={"expert_parallel": world_size})
    return {name: gate(case) for name, case in cases.items()}
