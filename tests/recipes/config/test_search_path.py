"""Recipes and choices of the user, beside Graft's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe.errors import ConfigError
from recipes.config.compose import compose_config, with_recipe
from recipes.config.search_path import CONF, choices_of, conf_folders
from tests.grid import each

UPCYCLE = "+recipe=upcycle"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with ``conf``."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "conf/recipe/mine.yaml", "# @package _global_\ndefaults: [upcycle, _self_]\nseed: 5\n")
    write(tmp_path / "conf/router/mine.yaml", "defaults: [sigmoid, _self_]\ntop_k: 3\n")
    write(tmp_path / "more/router/other.yaml", "defaults: [topk, _self_]\ntop_k: 4\n")
    return tmp_path


def write(path: Path, text: str) -> None:
    """Writes a file and its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_conf_of_the_working_folder_is_beside_ours(here: Path) -> None:
    values = compose_config(["+recipe=mine", "router=mine"])
    assert values["seed"] == 5 and values["job"] == "upcycle"
    assert values["router"]["score"] == "sigmoid" and values["router"]["top_k"] == 3


@each("form", ["[more]", "more", "[{here}/more]", "['file://{here}/more']"])
def test_folders_of_hydra_search_path_are_searched(here: Path, form: str) -> None:
    path = f"hydra.searchpath={form.format(here=here)}"
    values = compose_config([UPCYCLE, "router=other", path])
    assert values["router"]["top_k"] == 4
    assert list(choices_of("router", [path])) == sorted([*choices_of("router"), "other"])


@each(
    "overrides, said",
    [
        ([UPCYCLE, "router=nope"], "mine, mod, mutual_choice"),
        ([], "One of: continue, llama_moe_v2, mine, pretrain"),
        ([UPCYCLE, "hydra.searchpath=[none]"], "there is no such folder"),
        ([UPCYCLE, "hydra.run.dir=x"], "hydra.run.dir='x': Graft starts its runs itself"),
        ([UPCYCLE, "hydra/launcher=joblib"], "hydra/launcher='joblib': Graft starts its runs itself"),
    ],
)
def test_mistakes_know_the_users_choices(here: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        compose_config(overrides)
    assert said.lower() in str(raised.value).lower()


def test_a_choice_that_would_be_hidden_is_refused_where_it_is_chosen(here: Path) -> None:
    write(here / "conf/router/topk.yaml", "top_k: 9\n")
    write(here / "conf/config.yaml", "of: another project\n")
    with pytest.raises(ConfigError, match="conf/router/topk.yaml has the name of one of Graft's own"):
        compose_config([UPCYCLE])
    assert compose_config([UPCYCLE, "router=sigmoid"])["router"]["score"] == "sigmoid"
    write(here / "conf/router/topk.yaml", (CONF / "router/topk.yaml").read_text())
    assert compose_config([UPCYCLE])["router"]["top_k"] == 2


def test_a_choice_of_the_users_that_sets_a_job_needs_no_recipe(here: Path) -> None:
    write(here / "conf/study/own.yaml", "# @package _global_\njob: pretrain\n")
    assert with_recipe(["+study=own"]) == ("+study=own",)
    assert compose_config(with_recipe(["router=mine"]))["job"] == "upcycle"


def test_a_checkout_has_no_second_conf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONF.parent)
    assert conf_folders() == [CONF]
