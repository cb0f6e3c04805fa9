"""What ``python -m tools.compare_engines`` runs, reads and says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe.errors import GraftError
from recipes.config.compose import compose_config
from recipes.config.schema import parse_config
from recipes.engines import engine_classes
from recipes.engines.base import EngineLayout
from recipes.studies.benchmarks.engine_losses import REFERENCE, Series, compared_layouts, run_layouts


def test_every_engine_offers_layouts_that_its_config_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = compared_layouts()
    assert layouts[0] == REFERENCE and len({one.name for one in layouts}) == len(layouts)
    parsed = [parse_config(compose_config(["+recipe=upcycle", *one.options])) for one in layouts]
    assert {config.engine.name for config in parsed} == engine_classes().keys()
    for layout, config in zip(layouts, parsed, strict=True):
        monkeypatch.setenv("WORLD_SIZE", str(layout.ranks))
        assert engine_classes()[config.engine.name].check(config.engine) is None, layout


def test_a_layout_is_named_by_its_options() -> None:
    assert REFERENCE.name == "1 rank, native"
    spread = EngineLayout(2, ("engine=deepspeed", "engine.zero_stage=3"))
    assert spread.name == "2 ranks, deepspeed, zero_stage=3"


def test_the_distance_is_that_of_the_step_furthest_away() -> None:
    ours = Series(REFERENCE, (2.0, 1.1, 1.0), 1.0, 0.1)
    assert ours.distance(Series(REFERENCE, (2.0, 1.0, 1.0), 1.0, 0.1)) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="shorter"):
        ours.distance(Series(REFERENCE, (2.0,), 1.0, 0.1))


def test_losses_are_read_from_what_a_run_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, object]] = [
        {"stage": "dense", "step": 1, "loss": 9.0, "step_s": 1.0},
        {"stage": "moe", "step": 1, "loss": 3.0, "step_s": 0.5},
        {"stage": "moe", "step": 2, "loss": 2.0, "step_s": 0.1},
        {"stage": "moe", "step": 3, "loss": 1.5, "step_s": 0.2},
        {"stage": "moe", "step": 3, "val_loss": 1.75},
    ]
    commands: list[list[str]] = []

    def ran(layout: EngineLayout, options: list[str]) -> None:
        commands.append([*layout.options, *options])
        folder = tmp_path / next(o.removeprefix("run.name=") for o in options if o.startswith("run.name="))
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr("recipes.studies.benchmarks.engine_losses._train", ran)
    said: list[str] = []
    other = EngineLayout(2, ("engine=native",))
    first, second = run_layouts([REFERENCE, other], ["dense=folder"], tmp_path, said.append)
    assert (first.losses, first.validation, first.step_s) == ((3.0, 2.0, 1.5), 1.75, 0.2)
    assert second.layout == other and second.distance(first) == 0
    assert said == ["1/2: 1 rank, native", "2/2: 2 ranks, native"]
    assert all("dense=folder" in command for command in commands)


@pytest.mark.distributed
def test_a_run_that_fails_is_told_with_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(GraftError, match="1 rank, native failed with exit code") as failed:
        list(run_layouts([REFERENCE], ["dense=nowhere", "train.steps=-1"], tmp_path, lambda _: None))
    assert "train.steps=-1" in str(failed.value)
