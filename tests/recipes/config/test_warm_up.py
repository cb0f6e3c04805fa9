"""Default warm-ups scale with short runs; those that a user sets stay as they are."""

from __future__ import annotations

import pytest

from recipes.config.compose import compose_config
from tests.grid import each

RUNS: dict[str, tuple[list[str], int]] = {
    "two steps": (["train.steps=2"], 0),
    "a fifth": (["train.steps=50"], 10),
    "long enough": (["train.steps=100"], 20),
    "no training": (["train.steps=0"], 20),
    "set": (["train.steps=2", "optim.schedule.warmup_steps=20"], 20),
    "set in a mapping": (["train.steps=9", "optim.schedule={warmup_steps: 7}"], 7),
    "set by a choice's name alone is not": (["train.steps=10", "optim=muon"], 2),
    "a long decay": (
        ["train.steps=10", "optim.schedule.kind=wsd", "optim.schedule.decay_fraction=0.8"],
        1,
    ),
    "all decay": (["train.steps=10", "optim.schedule.kind=wsd", "optim.schedule.decay_fraction=1.0"], 0),
    "a wrong length is the schema's": (["train.steps=many"], 20),
}


def _warm_up(section: str, *overrides: str) -> int:
    values = compose_config(["+recipe=upcycle", *overrides])
    for name in section.split("."):
        values = values[name]
    found: int = values["warmup_steps"]
    return found


@each(("overrides", "expected"), RUNS.values(), ids=RUNS.keys())
def test_the_warm_up_of_the_run(overrides: list[str], expected: int) -> None:
    assert _warm_up("optim.schedule", *overrides) == expected


def test_every_stage_has_its_own_length() -> None:
    assert _warm_up("model", "model.steps=10") == 2
    assert _warm_up("model", "train.steps=10") == 40
    assert _warm_up("stage2", "stage2.steps=10") == 2


@pytest.mark.parametrize("recipe", ["pretrain", "llama_moe_v2"])
def test_a_recipes_warm_up_scales_as_well(recipe: str) -> None:
    values = compose_config([f"+recipe={recipe}", "train.steps=5"])
    assert values["optim"]["schedule"]["warmup_steps"] == 1
