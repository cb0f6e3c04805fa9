"""What README.md tells people to type exists: tools, options, files."""

from __future__ import annotations

import re
import shlex
import tomllib

import pytest

from recipes.config.compose import compose_config
from recipes.config.schema import parse_config
from tests.paths import ROOT

README = ROOT / "README.md"

pytestmark = pytest.mark.skipif(not README.is_file(), reason="there is no README.md yet")


def text() -> str:
    """The page."""
    return README.read_text(encoding="utf-8")


def commands() -> list[str]:
    """Lines of shell blocks, continued lines joined, without prompts and comments."""
    blocks = re.findall(r"```(?:bash|sh|shell|console)\n(.*?)```", text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"^\$ |\s+#.*$|^#.*$", "", line).strip() for line in lines) if line]


def test_tools_exist() -> None:
    for name in set(re.findall(r"python3? -m tools\.(\w+)", text())):
        assert (ROOT / "tools" / f"{name}.py").is_file(), name


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text()):
        if "://" not in target and not target.startswith("mailto:"):
            assert (ROOT / target).exists(), target


def test_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in commands():
        if command.startswith("make "):
            named = [
                word for word in shlex.split(command)[1:] if "=" not in word and not word.startswith("-")
            ]
            assert set(named) <= targets, command


def test_commands_that_train_are_understood() -> None:
    trained = [command for command in commands() if "train.py" in command and "--help" not in command]
    assert trained, "the README shows no training command"
    for command in trained:
        words = shlex.split(re.split(r"[|>;&]", command)[0])
        overrides = [word for word in words[words.index("train.py") + 1 :] if word != "--cfg"]
        # Placeholders in capitals stand for what only the reader knows.
        parse_config(compose_config(overrides))


def test_it_installs_what_is_pinned() -> None:
    name = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"]
    for wrong in re.findall(r"pip install (?!-r|-e|\.)(\S+)", text()):
        assert wrong.startswith((name, "--")), wrong
