"""Configs composed from parts are those that hydra composes."""

from __future__ import annotations

from unittest.mock import patch

import pytest

from moe.errors import ConfigError
from recipes.config import compose as production
from recipes.config.compose import compose_config
from tests.grid import each
from tests.recipes.jobs.composed_once import composed_once

_LISTS = ["data.path=[a.txt,b.txt]", "upcycle.layers=last:1", "dense=null", "run.name='a,b'"]


@each(
    "overrides",
    [
        ["+recipe=upcycle", "train.steps=5", "train.steps=7", "optim.lr=1e-4"],
        ["+recipe=upcycle", "router=sigmoid", "router.top_k=1", "upcycle=drop", "attention=moe"],
        ["+recipe=upcycle_vs_cpt", *_LISTS],
        ["+recipe=pretrain", "engine=deepspeed", "engine.zero_stage=1"],
    ],
)
def test_it_is_what_hydra_composes(overrides: list[str]) -> None:
    whole = compose_config(overrides)
    with composed_once():
        for _ in range(2):
            assert compose_config(overrides) == whole
        with patch.object(production, "initialize_config_dir", None):
            assert compose_config(overrides) == whole


def test_mistakes_are_hydra_s() -> None:
    with composed_once(), pytest.raises(ConfigError, match="Did you mean train.steps"):
        compose_config(["+recipe=upcycle", "train.step=5"])
