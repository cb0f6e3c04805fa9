"""Checks README.md and docs/: commands, options, modules, files and links that they name exist."""

from __future__ import annotations

import re
import shlex
import tomllib
from functools import cache
from pathlib import Path

import pytest

from recipes.config.compose import compose_config
from recipes.config.schema import parse_config
from tests.paths import ROOT

README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "RESULTS.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = ("kernels", "moe", "recipes", "tools", "tests", "conf", "docs")
# Where Graft's own commands take their options from, besides their own file.
SHARED_OPTIONS = ("tools/command.py",)


def commands(page: str) -> list[str]:
    """Returns the lines of a page's shell blocks, continued lines joined, without prompts and comments."""
    blocks = re.findall(r"```(?:bash|sh|shell|console)\n(.*?)```", page, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"^\$ |\s+#.*$|^#.*$", "", line).strip() for line in lines) if line]


def code_spans(page: str) -> list[str]:
    """Returns what stands between backticks in running text."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", page, flags=re.DOTALL))


def anchors(page: str) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def module_exists(dotted: str) -> bool:
    """Returns whether a dotted name is a module of ours, or a name that one defines."""
    path = ROOT / dotted.replace(".", "/")
    if path.is_dir() or path.with_suffix(".py").is_file():
        return True
    owner = path.parent.with_suffix(".py") if path.parent != ROOT else path
    owner = owner if owner.is_file() else path.parent / "__init__.py"
    return owner.is_file() and re.search(rf"\b{re.escape(path.name)}\b", owner.read_text()) is not None


@cache
def source_of(module: str) -> str:
    """Returns the text that may define options of ``python -m MODULE``."""
    path = ROOT / module.replace(".", "/")
    files = sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    return "\n".join(file.read_text() for file in [*files, *(ROOT / name for name in SHARED_OPTIONS)])


@cache
def option_names() -> tuple[set[str], set[str]]:
    """Returns every key under ``conf/``, and those that hold others at its top."""
    files = [path.read_text() for path in (ROOT / "conf").rglob("*.yaml")]
    keys = {key for text in files for key in re.findall(r"^[- /]*(?:\w+@)?(\w+):", text, re.MULTILINE)}
    groups = {folder.name for folder in (ROOT / "conf").iterdir() if folder.is_dir()} - {"recipe"}
    return keys, groups | set(re.findall(r"^(\w+):$", (ROOT / "conf/config.yaml").read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
class TestPage:
    """Names on one page."""

    def test_paths_and_modules_exist(self, page: Path) -> None:
        missing = []
        for span in code_spans(page.read_text()):
            path = span.split(":")[0].split("[")[0].strip("/")
            # Capitals, braces and dots in a row are placeholders; a word without a slash is no path.
            if re.fullmatch(rf"({'|'.join(SOURCES)})/[a-z0-9_./*]+", path) and "mine" not in path:
                missing += [] if list(ROOT.glob(path)) else [span]
            elif re.fullmatch(r"(kernels|moe|recipes|tools)(\.\w+)+", span):
                missing += [] if module_exists(span) else [span]
        assert not missing

    def test_commands_exist_with_their_options(self, page: Path) -> None:
        text = page.read_text()
        missing = []
        for command in [*commands(text), *code_spans(text)]:
            found = re.match(r"(?:\S+=\S+ )*python3? -m ((?:tools|kernels|tests)\.[a-z]\w*)(.*)", command)
            if found is None:
                continue
            module, rest = found.groups()
            if not module_exists(module):
                missing.append(command)
                continue
            options = [
                option for option in re.findall(r"(?<!\S)(--[a-z][a-z-]+)", rest) if option != "--help"
            ]
            missing += [f"{module} {option}" for option in options if f'"{option}"' not in source_of(module)]
        assert not missing

    def test_options_of_runs_exist(self, page: Path) -> None:
        known, groups = option_names()
        words = [
            word
            for span in [*commands(page.read_text()), *code_spans(page.read_text())]
            for word in span.split()
        ]
        named = [
            re.match(r"['\"]?[+~]*(\w+)((?:\.\w+)+)['\"]?(?:=|$)(?<!\.py)(?<!\.json)", word) for word in words
        ]
        options = {match[1] + match[2] for match in named if match and match[1] in groups}
        assert not {option for option in options if option.rpartition(".")[2] not in known}

    def test_links_lead_somewhere(self, page: Path) -> None:
        for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text()):
            if "://" in target or target.startswith("mailto:"):
                continue
            linked = page.parent / target if target else page
            assert linked.exists(), target
            if anchor:
                assert anchor in anchors(linked.read_text()), f"{target}#{anchor}"


def test_pages_that_the_code_names_exist() -> None:
    files = [path for part in SOURCES for path in (ROOT / part).rglob("*") if path.suffix in {".py", ".yaml"}]
    named = {page for path in files for page in re.findall(r"docs/[\w/]+\.md", path.read_text())}
    assert not {page for page in named if not (ROOT / page).is_file()}


def test_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in commands(README.read_text()):
        if command.startswith("make "):
            named = [
                word for word in shlex.split(command)[1:] if "=" not in word and not word.startswith("-")
            ]
            assert set(named) <= targets, command


def test_commands_that_train_are_understood() -> None:
    lines = [command for page in PAGES for command in commands(page.read_text()) if "train.py" in command]
    assert any("+recipe=upcycle" in line for line in lines), "no page shows how to train"
    for command in lines:
        words = shlex.split(re.split(r"[|>;&]", command)[0])
        overrides = [word for word in words[words.index("train.py") + 1 :] if word not in ("--cfg", "...")]
        if "..." in words and not any(word.startswith("+recipe=") for word in overrides):
            overrides.insert(0, "+recipe=upcycle")  # a line that shows one option of any recipe
        # Placeholders in capitals stand for what only the reader knows.
        parse_config(compose_config(overrides))


def test_it_installs_what_is_pinned() -> None:
    name = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"]
    for wrong in re.findall(r"pip install (?!-r|-e|\.)(\S+)", README.read_text()):
        assert wrong.lstrip('"').startswith((name, "--")), wrong
