"""Every choice of every group composes and parses; yaml files and config classes have the same options."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moe.experts.experts import Experts
from moe.routers import router_class, router_classes
from moe.types import Config, LayerContext, RouterContext
from moe.upcycle import upcycle_methods
from recipes.config.compose import CONF, compose_config, to_yaml
from recipes.config.schema import RunConfig, TrainConfig, parse_config
from recipes.config.sections import section_classes
from recipes.config.sections.compare_config import CompareConfig
from recipes.engines import engine_classes
from recipes.jobs import job_classes
from tests.moe.routers.routing_cases import make_bank
from tests.recipes.models.whole_surgery import make_surgery

GROUPS = sorted(
    path.name for path in CONF.iterdir() if path.is_dir() and path.name not in ("recipe", "section")
)
CHOICES = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
RECIPES = sorted(path.stem for path in (CONF / "recipe").glob("*.yaml"))
FAMILIES = {"router": router_classes, "upcycle": upcycle_methods, "engine": engine_classes}
# Sections that may be absent, which their file says by a name alone.
ABSENT = {"attention": "attention.name"}
# Sections of an option that only one choice of their group has: the others do not show them.
ONLY_WITH = {"optim.muon": ("optim", "muon")}


@functools.cache
def composed(*overrides: str) -> tuple[dict[str, Any], RunConfig]:
    """Values of a command line, and the config that they make; do not change them."""
    values = compose_config(["+recipe=upcycle", *overrides])
    return values, parse_config(values)


def parsed(*overrides: str) -> RunConfig:
    """The typed config of a command line."""
    return composed(*overrides)[1]


def leaves(values: Any, prefix: str = "") -> set[str]:
    """Dotted paths of everything in nested dictionaries that is none itself."""
    if not isinstance(values, dict):
        return {prefix}
    return {
        leaf for key, value in values.items() for leaf in leaves(value, f"{prefix}.{key}" if prefix else key)
    }


def fields(config: Config, prefix: str = "") -> set[str]:
    """Dotted paths of the fields of nested config classes."""
    found = set()
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        path, value = f"{prefix}{field.name}", getattr(config, field.name)
        if field.name == "sections":
            found |= {leaf for name, section in value.items() for leaf in fields(section, f"{name}.")}
            continue
        found |= fields(value, f"{path}.") if dataclasses.is_dataclass(value) else {path}
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_parses_and_names_a_job(recipe: str) -> None:
    assert parse_config(compose_config([f"+recipe={recipe}"])).job in job_classes()


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_parses(group: str, choice: str) -> None:
    values, config = composed(f"{group}={choice}")
    own = yaml.safe_load((CONF / group / f"{choice}.yaml").read_text())
    for key, value in own.items():
        if key not in ("defaults", "seed"):  # data.seed follows seed
            assert values[group][key] == value or isinstance(value, str), (group, key)
    if group in FAMILIES:
        assert type(getattr(config, group)) is FAMILIES[group]()[values[group]["name"]].config_class


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_files_show_every_option_and_no_other(group: str, choice: str) -> None:
    values, config = composed(f"{group}={choice}")
    hidden = {path for path, only in ONLY_WITH.items() if only != (group, choice)}
    expected = {
        ABSENT.get(path, path) for path in fields(config) if not any(path.startswith(f"{h}.") for h in hidden)
    }
    differ = sorted(leaves(values) ^ expected)
    assert not differ, f"conf/{group}/{choice}.yaml and the config class differ in: {', '.join(differ)}"


def test_every_class_has_a_file_of_its_name() -> None:
    for group, classes in FAMILIES.items():
        names = {yaml.safe_load(path.read_text()).get("name") for path in (CONF / group).glob("*.yaml")}
        files = {path.stem for path in (CONF / group).glob("*.yaml")}
        without = sorted(set(classes()) - (names & files))
        assert not without, f"conf/{group} has no file for: {', '.join(without)}"


def test_no_file_is_left_over() -> None:
    known = {CONF / "config.yaml", *(CONF / group / f"{choice}.yaml" for group, choice in CHOICES)}
    known |= {CONF / "recipe" / f"{recipe}.yaml" for recipe in RECIPES}
    known |= {CONF / "section" / f"{section}.yaml" for section in section_classes()}
    assert set(CONF.rglob("*.yaml")) == known
    defaults = yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]
    assert {key for entry in defaults if isinstance(entry, dict) for key in entry} == set(GROUPS)


@pytest.mark.parametrize("choice", [choice for group, choice in CHOICES if group == "router"])
def test_every_router_is_built_and_routes(choice: str) -> None:
    config = parsed(f"router={choice}").router
    cls = router_class(config.name)
    assert config.check(8) is None
    router = cls(config, 16, 8)
    router.reset_parameters(torch.Generator().manual_seed(0))
    router.attach(Experts(make_bank(16, 8)))
    batch = RouterContext(token_ids=torch.arange(5).view(1, 5), keys={"modality": torch.zeros(1, 5).long()})
    routing = router(torch.randn(5, 16), LayerContext(batch, 0))
    assert routing.num_experts == 8
    assert routing.expert_ids_TK.shape[0] == 5
    assert bool((routing.expert_ids_TK < 8).all())


@pytest.mark.parametrize("choice", [choice for group, choice in CHOICES if group == "upcycle"])
def test_every_method_is_built(choice: str) -> None:
    surgery = make_surgery(parsed(f"upcycle={choice}", "upcycle.num_experts=4"))
    assert surgery.method.config.num_experts == 4
    assert surgery.make_router(16, 4).num_experts == 4


def test_a_config_that_is_shown_is_the_config_that_is_run(tmp_path: Path) -> None:
    overrides = [
        "router=sigmoid",
        "router.top_k=3",
        "run.name=x",
        "optim.clip_norm=null",
        "tracker.tags=[a,b]",
    ]
    values = compose_config(["+recipe=upcycle", *overrides])
    assert yaml.safe_load(to_yaml(values)) == values
    config = parse_config(yaml.safe_load(to_yaml(values)))
    assert config == parsed(*overrides)
    assert (config.router.top_k, config.run.name, config.optim.clip_norm) == (3, "x", None)  # type: ignore[attr-defined]


def test_recipes_choose_and_the_command_line_has_the_last_word() -> None:
    assert parsed().router.name == "topk"
    assert parsed("router=switch").router.top_k == 1  # type: ignore[attr-defined]
    assert parsed("seed=7").data.seed == 7


def test_values_with_special_characters_arrive_when_quoted() -> None:
    path = "/x/a=b/part-[0-9]{1,2}.txt"
    assert parsed(f'data.path="{path}"').data.path == path
    assert parsed("data.path=[/x/a.txt,/x/b.txt]").data.path == ["/x/a.txt", "/x/b.txt"]


@pytest.mark.parametrize(
    ("batch", "micro", "world", "expected"),
    [(16, "auto", 1, (16, 1)), (16, "auto", 4, (4, 1)), (16, 2, 4, (2, 2)), (16, 1, 1, (1, 16))],
)
def test_micro_batches_by_hand(batch: int, micro: Any, world: int, expected: tuple[int, int]) -> None:
    # global = world x micro x number of micro-batches: 16 = 1x16x1 = 4x4x1 = 4x2x2 = 1x1x16.
    train = TrainConfig(global_batch_size=batch, micro_batch_size=micro)
    assert (train.micro_size(world), train.num_micro_batches(world)) == expected


@pytest.mark.parametrize(
    ("overrides", "trained"),
    [
        ([], True),
        (["dense=/x"], False),
        (["dense=/x", "compare.cpt=true"], True),
        (["compare.cpt=false"], False),
    ],
)
def test_the_baseline_is_trained_with_the_default_model_unless_said_otherwise(
    overrides: list[str], trained: bool
) -> None:
    config = parsed(*overrides)
    assert config.section(CompareConfig).trains_cpt(config.dense) is trained
