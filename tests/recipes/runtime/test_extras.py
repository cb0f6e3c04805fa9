"""Packages of extras: what is missing is named with its extra, and nothing else needs it."""

from __future__ import annotations

import sys
import tomllib

import pytest

from recipes.engines import engine_classes
from recipes.runtime import extras
from recipes.runtime.extras import EXTRAS, check_names, is_there
from recipes.tracking.config import TrackerConfig
from tests.forked_commands import run_code
from tests.grid import each
from tests.paths import ROOT

#: An import hook that finds none of the modules that extras bring, nor whatever is in them.
HIDE = """
import sys

HIDDEN = {hidden}


class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


for name in [name for name in sys.modules if name.split(".")[0] in HIDDEN]:
    del sys.modules[name]
sys.meta_path.insert(0, Hide())
"""
TOPS = {module.partition(".")[0] for module in EXTRAS.values()}


def test_every_extra_is_one_of_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert EXTRAS.keys() <= project["optional-dependencies"].keys()
    assert project["name"] == extras.DISTRIBUTION


def test_a_module_is_there_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_there("json") and is_there("json.decoder")
    assert not is_there("no_such_module") and not is_there("no_such_module.core")
    monkeypatch.setitem(sys.modules, "json", None)
    assert not is_there("json")


@each("engine", sorted(EXTRAS.keys() & engine_classes().keys()))
def test_an_engine_without_its_library_names_the_extra(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = engine_classes()[engine]
    assert cls.check(cls.config_class(device="cpu")) is None
    monkeypatch.setitem(sys.modules, EXTRAS[engine], None)
    monkeypatch.setitem(sys.modules, EXTRAS[engine].partition(".")[0], None)
    assert str(cls.check(cls.config_class(device="cpu"))) == (
        f"name={engine!r}: it needs the package {EXTRAS[engine].replace('.', '-')}, which is not installed. "
        f'Run pip install "graft-moe[{engine}]", or set engine=native.'
    )


@each(
    "mode, environment, path",
    [
        ("offline", "", "tracker.mode='offline'"),
        ("online", "disabled", "tracker.mode='online'"),
        ("auto", "online", "WANDB_MODE='online'"),
        ("auto", "dryrun", "WANDB_MODE='dryrun'"),
        ("auto", "", None),
        ("auto", "disabled", None),
        ("disabled", "online", None),
    ],
)
def test_wandb_is_missed_where_it_is_asked_for(
    mode: str, environment: str, path: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", environment)
    assert TrackerConfig(mode=mode).check() == []
    monkeypatch.setitem(sys.modules, "wandb", None)
    said = [str(mistake) for mistake in TrackerConfig(mode=mode).check()]
    assert len(said) == (path is not None)
    if path is not None:
        assert said[0].startswith(f"{path}: it needs the package wandb")
        assert 'pip install "graft-moe[wandb]"' in said[0]


def test_commands_end_before_anything_starts_and_the_others_need_no_extra() -> None:
    hide = HIDE.format(hidden=TOPS)
    commands = [["train", f"engine={engine}"] for engine in sorted(EXTRAS.keys() & engine_classes().keys())]
    commands += [["train", "tracker.mode=offline"]]
    code = f"""{hide}
from recipes.launch import main
import recipes.jobs.session
recipes.jobs.session.run_job = lambda *a: 0
codes = [main([*command[1:], "+recipe=upcycle", "engine.device=cpu"]) for command in {commands}]
assert codes == [2] * {len(commands)}, codes
assert main(["+recipe=upcycle", "engine.device=cpu"]) == 0
"""
    ended = run_code(code)
    assert ended.code == 0, ended
    assert [line.partition("[")[2].partition("]")[0] for line in ended.err.splitlines()] == [
        *sorted(EXTRAS.keys() & engine_classes().keys()),
        "wandb",
    ]


def test_a_package_that_has_the_name_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_names() == []
    monkeypatch.setattr(extras.metadata, "version", lambda name: "0.18.5")
    assert [mistake.path for mistake in check_names()] == ["kernels"]
