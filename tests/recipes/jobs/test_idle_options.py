"""Options that were set and do nothing are named once, with the reason; a plain run is told nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import recipes.jobs.session
from moe.routers import router_classes
from moe.upcycle import upcycle_methods
from recipes.config.compose import CONF, compose_config
from recipes.config.schema import RunConfig, parse_config
from recipes.engines import engine_classes
from recipes.jobs import job_classes
from recipes.jobs.idle_options import idle_line, idle_options, written_options
from recipes.launch import main
from tests.grid import each
from tests.recipes.jobs.composed_once import composed_once

BEGIN = "warning: without effect in this run: "
ROUTED = "attention=moe attention.router.balance_coef=0 attention.router.balance_scope=sequence"
FAMILIES = {"router": router_classes(), "upcycle": upcycle_methods(), "engine": engine_classes()}
# Recipe, other options, and what is said of them.
SAID = [
    ("upcycle", "router.top_k=3", None),
    ("upcycle", "router.balance_coef=0 router.balance_scope=sequence", "router.balance_scope"),
    ("upcycle", "router=deepseek_v3 router.bias_rate=0 router.bias_stop_step=9", "router.bias_stop_step"),
    ("upcycle", "router=deepseek_v3 router.bias_stop_step=9", None),
    ("upcycle", "stage2.lr=1e-4", "stage2.lr (only the job two_stage reads it)"),
    (
        "upcycle_vs_cpt",
        "compare.cpt=true",
        "compare.cpt (only the job pretrain, two_stage or upcycle reads it)",
    ),
    ("upcycle", "calibration.samples=8", "calibration.samples (upcycle=copy looks at no activations)"),
    ("upcycle", "upcycle=snake calibration.samples=8", None),
    ("upcycle", "dense=/d model.steps=9", "model.steps (dense is given"),
    ("upcycle", "trust_remote_code=true", "trust_remote_code"),
    ("upcycle", "train.steps=0 optim.lr=1", "optim.lr (train.steps is 0)"),
    ("upcycle", "optim.schedule.decay_fraction=0.3", "optim.schedule.decay_fraction (only kind=wsd"),
    ("upcycle", "optim.schedule={kind:constant,min_lr_ratio:0.5}", "optim.schedule.min_lr_ratio"),
    ("upcycle", "experts.lora.alpha=3 faults.spike_window=9", "experts.lora.alpha (rank is 0); faults.spike"),
    ("upcycle", "tracker.mode=disabled tracker.project=x tracker.tags=[y]", "project, tracker.tags ("),
    ("upcycle", ROUTED, "attention.router.balance_scope"),
    ("upcycle", "router=permuted +router.search={steps:0,entropy_coef:1.0}", "router.search.entropy_coef"),
]


def parsed(overrides: list[str]) -> tuple[dict[str, object], RunConfig]:
    """Values and config of a command line."""
    with composed_once():
        values = compose_config(overrides)
    return values, parse_config(values)


@each("recipe, given, said", SAID)
def test_what_has_no_effect_is_named(recipe: str, given: str, said: str | None) -> None:
    overrides = [f"+recipe={recipe}", *given.split()]
    line = idle_line(overrides, *parsed(overrides), job_classes())
    if said is None:
        assert line is None, line
    else:
        assert line is not None and line.startswith(BEGIN) and said in line, line


@each("recipe", sorted(path.stem for path in (CONF / "recipe").glob("*.yaml")))
def test_recipes_set_nothing_in_vain(recipe: str) -> None:
    overrides = [f"+recipe={recipe}"]
    assert idle_line(overrides, *parsed(overrides), job_classes()) is None


def options(config: Any, prefix: str = "") -> Iterator[str]:
    """Paths of all options and sections of a config."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        yield f"{prefix}{field.name}"
        if field.name == "sections":
            yield from (path for name, own in value.items() for path in (name, *options(own, f"{name}.")))
        elif dataclasses.is_dataclass(value):
            yield from options(value, f"{prefix}{field.name}.")


@each("family, name", [(family, name) for family, classes in FAMILIES.items() for name in classes])
def test_what_is_declared_is_an_option(family: str, name: str) -> None:
    own = FAMILIES[family][name].config_class(name=name)
    config = dataclasses.replace(parsed(["+recipe=upcycle"])[1], **{family: own})
    declared = idle_options(config)
    assert declared and declared.keys() <= set(options(config)), name


def test_a_recipe_of_ones_own_counts_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf/recipe").mkdir(parents=True)
    (tmp_path / "conf/recipe/own.yaml").write_text(
        yaml.safe_dump({"job": "upcycle", "router": {"z_coef": 1}})
    )
    monkeypatch.chdir(tmp_path)
    assert written_options(["+recipe=own", "seed=1"], {}) == ["router.z_coef", "seed"]


def test_the_warning_comes_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recipes.jobs.session, "run_job", lambda *given: 0)
    assert main(["+recipe=upcycle", f"output_dir={tmp_path / 'o'}", "stage2.steps=4"]) == 0
    err = capsys.readouterr().err
    assert err == f"{BEGIN}stage2.steps (only the job two_stage reads it)\n"
