"""Flags of ``train.py``, and what hydra's print."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from moe.errors import ConfigError
from recipes.config.compose import with_recipe
from recipes.config.hydra_views import complete, config_text, show_info
from recipes.config.run_flags import RunFlags, read_flags
from recipes.launch import main
from tests.grid import each

UPCYCLE = "+recipe=upcycle"


@each(
    "line, flags",
    [
        ("a=1 b=2", {}),
        ("--cfg a=1 b=2", {"cfg": "shown"}),
        ("a=1 b=2 --cfg", {"cfg": "shown"}),
        ("--cfg job a=1 -p router b=2 --resolve", {"cfg": "job", "package": "router", "resolve": True}),
        ("a=1 --cfg=all b=2", {"cfg": "all"}),
        ("a=1 -m b=2 --nproc 2", {"multirun": True, "ranks": 2}),
        ("--nproc-per-node=3 a=1 b=2 --max-restarts 1", {"ranks": 3, "restarts": 1}),
        ("--info a=1 b=2", {"info": "all"}),
        ("a=1 b=2 -i searchpath", {"info": "searchpath"}),
        ("-sc a=1 b=2", {"complete": True}),
    ],
)
def test_flags_stand_anywhere(line: str, flags: dict[str, object]) -> None:
    assert read_flags(line.split()) == RunFlags(("a=1", "b=2"), **flags)


def test_folders_are_the_search_path() -> None:
    flags = read_flags(["-cd", "x,y", "a=1", "--config-dir", "z"])
    assert flags.overrides == ("a=1", 'hydra.searchpath=["x,y","z"]')


@each(
    "line, said",
    [
        ("--resume", "command line='--resume': there is no such flag"),
        ("-x", "there is no such flag"),
        ("--nproc 0", "--nproc=0: it must be 1 or more"),
        ("--nproc two", "it cannot be read"),
        ("--max-restarts -1", "--max-restarts=-1: it must be 0 or more"),
        ("-p router", "--package='router': it is a part of what --cfg prints. Add --cfg job."),
    ],
)
def test_a_wrong_flag_is_one_sentence(line: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read_flags(line.split())
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_cfg_prints_packages_resolved_or_not() -> None:
    given = [UPCYCLE, "router.top_k=3"]
    assert config_text("job", given, "router").startswith("# @package router\nname: topk\ntop_k: 3\n")
    assert config_text("job", given, "router.top_k") == "3\n"
    assert "\ncache_dir: ${oc.env:" in config_text("job", given)
    assert "\ncache_dir: ${oc.env:" not in config_text("job", given, resolve=True)
    assert config_text("hydra", given).startswith("hydra:\n") and "\nrouter:\n" in config_text("all", given)


@each(
    "kind, package, overrides, said",
    [
        ("job", "ruter", [UPCYCLE], "--package='ruter': the config has no such part. Did you mean router?"),
        ("job", None, [UPCYCLE, "router.topk=1"], "Did you mean router.top_k?"),
        ("job", None, ["job=null"], "no recipe is chosen"),
    ],
)
def test_mistakes_stay_one_sentence(kind: str, package: str | None, overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        config_text(kind, overrides, package)
    assert said in str(raised.value)


def test_info_is_hydras(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.WARNING)
    show_info("searchpath", [UPCYCLE])
    assert "Config search path" in "".join(capsys.readouterr())


def test_completion_is_hydras(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf/router").mkdir(parents=True)
    (tmp_path / "conf/router/sigh.yaml").write_text("defaults: [topk]\n")
    monkeypatch.setattr("sys.argv", ["graft train"])
    for line, found in (
        ("graft router=sig", {"router=sigma", "router=sigmoid", "router=sigh"}),
        ("python train.py +recipe=upcycle train.ste", {"train.steps="}),
        ("graft +recipe=upcycle stage2.ste", {"stage2.steps="}),
    ):
        monkeypatch.setenv("COMP_LINE", line)
        complete(["query=bash"])
        assert set(capsys.readouterr().out.split()) == found
    complete(["install=bash"])
    assert capsys.readouterr().out.endswith("hydra_bash_completion graft\n")
    with pytest.raises(ConfigError, match="install=bash, zsh or fish"):
        complete(["install=nosh"])


@each(
    "given, added",
    [
        ([], True),
        (["router=sigmoid", "train.steps=5"], True),
        (["router=topk,sigmoid", "train.steps=5"], True),
        (["+recipe=pretrain"], False),
        (["recipe=pretrain"], False),
        (["+recipe=quick,upcycle"], False),
        (["job=pretrain"], False),
        (["job=null"], False),
        (["train.stepz=5"], True),
    ],
)
def test_a_command_without_a_recipe_has_the_default_one(given: list[str], added: bool) -> None:
    assert with_recipe(given) == ((UPCYCLE,) if added else ()) + tuple(given)


def test_the_default_recipe_is_named_in_one_line_and_is_what_it_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["--cfg", "router=sigmoid"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "no recipe is named: +recipe=upcycle (--list recipe has others)\n"
    assert main(["--cfg", "router=sigmoid", UPCYCLE]) == 0
    assert capsys.readouterr() == (printed.out, "")
    monkeypatch.setenv("RANK", "1")
    assert main(["--cfg", "router=sigmoid"]) == 0
    assert capsys.readouterr() == (printed.out, "")
