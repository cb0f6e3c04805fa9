"""One convention over all tools: the names of flags, ``--json``, and an example in every help."""

from __future__ import annotations

import importlib
import pkgutil
import re
import shlex
import sys
from typing import Any

import pytest

import tools
from moe.errors import ConfigError
from recipes.runtime import extras
from tests.grid import each
from tools.command import RENAMED, tool_parser

_SHARED = ("cli", "command", "mixture_flags")
NAMES = [info.name for info in pkgutil.iter_modules(tools.__path__) if info.name not in _SHARED]


def _help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    module = importlib.import_module(f"tools.{name}")
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    return capsys.readouterr().out


@each("name", NAMES)
def test_every_tool(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = _help(name, monkeypatch, capsys)
    flags = set(re.findall(r"--[a-z][a-z-]*", text.partition("\nexample:\n")[0]))
    assert "--json" in flags
    # An old name that means something else today is a count of experts alone.
    assert not flags & RENAMED.keys() - {"--experts"}, "an earlier spelling is back"
    if "--experts" in flags:
        assert re.search(r"--experts (E|EXPERTS)\b", text), "--experts is a count: use --backend"
    command, own = f"python -m tools.{name} ", text.partition("\nexample:\n")[2].strip()
    assert own.startswith(command) and "\n" not in own
    used = {word.partition("=")[0] for word in shlex.split(own.removeprefix(command)) if word[:2] == "--"}
    assert used <= flags, f"the example has unknown flags: {used - flags}"


@each(
    ("words", "taken", "told"),
    [
        (["--output", "x"], {"out": "x"}, "--output is now called --out"),
        (["--output=x"], {"out": "x"}, "--output is now called --out"),
        (["--precision", "bf16"], {"dtype": "bf16"}, "--precision is now called --dtype"),
        (["--experts=loop"], {"backend": "loop"}, "--experts is now called --backend"),
        (["seeds=3"], {"seeds": "3"}, "seeds is now called --seeds"),
        (["seeds=[1,2]", "a=b"], {"seeds": "1,2", "options": ["a=b"]}, "seeds is now called --seeds"),
    ],
)
def test_the_earlier_spelling_is_taken_and_the_new_one_told(
    words: list[str], taken: dict[str, Any], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = tool_parser("x", "y", example="")
    parser.add_argument("options", nargs="*")
    for flag in ("--out", "--dtype", "--backend", "--seeds"):
        parser.add_argument(flag)
    assert taken.items() <= vars(parser.parse_intermixed_args(words)).items()
    assert capsys.readouterr().err == f"warning: {told}\n"


def test_a_flag_that_a_tool_has_is_not_refused() -> None:
    parser = tool_parser("x", "y", example="")
    parser.add_argument("--experts", type=int)
    parser.add_argument("--backend")
    assert parser.parse_args(["--experts", "8", "--backend", "loop"]).experts == 8


@each("name, refuses", [("x", True), ("upcycle", True), ("verify", True), ("doctor", False)])
def test_a_package_that_has_the_name_of_ours_is_refused(
    name: str, refuses: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extras, "installed_version", lambda package: {"kernels": "0.18.5"}.get(package))
    parser = tool_parser(name, "y", example="")
    if not refuses:
        assert parser.parse_args([]).json is None
        return
    for read in (parser.parse_args, parser.parse_intermixed_args):
        with pytest.raises(ConfigError, match="kernels='0.18.5': this package of PyPI has the name"):
            read([])
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    assert "--json" in capsys.readouterr().out
