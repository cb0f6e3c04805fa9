"""Trains three experts on any number of ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

from torch.distributed.tensor import DTensor

from recipes.engines.optim.config import OptimConfig
from recipes.engines.optim.lr_schedule import ScheduleConfig
from tests.recipes.engines.engine_cases import GLOBAL_BATCH, SGD, Case, make_model, open_engine, train

_ADAPTIVE = OptimConfig(lr=3e-3, schedule=ScheduleConfig("constant", warmup_steps=0))
OPTIMIZERS = {"adamw": _ADAPTIVE, "muon": replace(_ADAPTIVE, name="muon")}


def train_by_rows(world_size: int) -> dict[str, Any]:
    """How they are cut, and by optimizer losses, weights and gradients."""
    with patch("tests.recipes.engines.engine_cases.EXPERTS", 3):
        model = make_model(Case())
        open_engine().prepare(model, SGD)
        _, layer = model.moe_layers()[0]
        cuts = [p.placements for p in layer.experts.parameters() if isinstance(p, DTensor)]
        held = [p.to_local().numel() / p.numel() for p in layer.experts.parameters()]
        found: dict[str, Any] = {"cuts": cuts, "held": held}
        for name, optim in OPTIMIZERS.items():
            outcome = train(Case(optim=optim, micro=GLOBAL_BATCH // world_size))
            found[name] = (outcome.series("loss"), outcome.weights, outcome.grads)
    return found
