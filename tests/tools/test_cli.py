"""The command ``graft``: every tool has one name, and runs as it does under ``python -m``."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from moe.errors import ConfigError
from tests.forked_commands import run_module
from tests.grid import each
from tests.paths import ROOT
from tools.cli import COMMANDS, GROUPS, main, split_command


def test_every_tool_has_one_name() -> None:
    modules = [module for module, _ in COMMANDS.values()]
    assert len(modules) == len(set(modules)) == sum(map(len, GROUPS.values()))
    tools = {f"tools.{path.stem}" for path in (ROOT / "tools").glob("*.py")}
    assert tools - {"tools.__init__", "tools.command", "tools.cli", "tools.mixture_flags"} <= set(modules)
    assert not [module for module in modules if importlib.util.find_spec(module) is None]


@each(
    "given, name, rest",
    [
        ("train +recipe=upcycle", "train", ["+recipe=upcycle"]),
        ("bench step --json -", "bench step", ["--json", "-"]),
        ("upcycle-vs-cpt", "upcycle-vs-cpt", []),
    ],
)
def test_names_are_split_from_arguments(given: str, name: str, rest: list[str]) -> None:
    assert split_command(given.split()) == (name, rest)


@each(
    "given, said",
    [
        ("trian", "graft='trian': there is no such command. Did you mean graft train?"),
        ("upcycle_vs_cpt", "Did you mean graft upcycle-vs-cpt?"),
        ("bench stpe", "graft='bench stpe': there is no such command. Did you mean bench step?"),
        ("bench --json", "Choose from: bench start, bench step"),
        ("xyzzy", "graft --help lists them."),
    ],
)
def test_an_unknown_name_suggests_the_nearest(given: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        main(given.split())
    assert said in str(raised.value)


def test_a_family_lists_its_members(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 0
    out = capsys.readouterr().out
    assert "bench step" in out and "doctor" not in out


def test_a_command_is_the_tool(tmp_path: Path) -> None:
    shown = run_module("tools.cli", "doctor", "--help", cwd=tmp_path)
    assert shown.code == 0 and shown.out.startswith("usage: graft doctor ") and "--cache-dir" in shown.out
    assert run_module("tools.doctor", "--help", cwd=tmp_path).out.startswith("usage: python -m tools.doctor ")
    missing = run_module("tools.cli", "report", str(tmp_path / "none"), cwd=tmp_path)
    assert missing.code == 2 and missing.err.startswith("error: ") and "Traceback" not in missing.err
    nowhere = run_module("tools.cli", "train", "+recipe=upcycle", "router.topk=1", cwd=tmp_path)
    assert nowhere.code == 2 and "Did you mean router.top_k?" in nowhere.err


def test_completion_offers_commands_then_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMP_LINE", "graft tr")
    assert main(["-sc", "query=bash"]) == 0
    assert {"train", "bench"} <= set(capsys.readouterr().out.split())
    monkeypatch.setenv("COMP_LINE", "graft bench st")
    assert main(["-sc", "query=bash"]) == 0
    assert {"start", "step"} <= set(capsys.readouterr().out.split())
