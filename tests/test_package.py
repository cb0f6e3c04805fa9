"""The wheel holds everything: built, installed into an empty folder, and run from another one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.patience import patience

PARTS = ("kernels", "moe", "recipes", "tools", "conf")
FILES = ("pyproject.toml", "README.md", "LICENSE")


def run(*command: str, cwd: Path, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a command; with `site` on the path, and no checkout."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(site)} if site else {}
    options = {"cwd": cwd, "env": environment, "capture_output": True, "text": True, "check": False}
    return subprocess.run(command, timeout=patience(300), **options)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds nothing but the installed wheel."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    for part in PARTS:
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
    # setuptools is pinned: nothing is fetched.
    build = [*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(folder), str(source)]
    built = run(*build, cwd=folder)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    install = [*pip, "install", "--no-deps", "--no-index", "--target", str(folder / "site"), str(wheel)]
    installed = run(*install, cwd=folder)
    assert installed.returncode == 0, installed.stderr
    shutil.rmtree(source)
    return folder / "site"


def test_the_wheel_holds_every_file(site: Path) -> None:
    suffixes = {".py", ".yaml", ".j2", ".json"}
    ours = {
        path.relative_to(ROOT)
        for part in PARTS
        for path in (ROOT / part).rglob("*")
        if path.suffix in suffixes and "__pycache__" not in path.parts
    }
    assert not {str(path) for path in ours if not (site / path).is_file()}


def test_the_command_runs_from_another_folder(site: Path, tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()  # somebody's own
    (tmp_path / "tools/__init__.py").write_text("raise ImportError('the wrong tools')")
    (tmp_path / "conf/recipe").mkdir(parents=True)
    own = "# @package _global_\ndefaults: [upcycle, _self_]\nrouter: {top_k: 3}\n"
    (tmp_path / "conf/recipe/mine.yaml").write_text(own)
    graft = str(site / "bin/graft")
    shown = run(graft, "--help", cwd=tmp_path, site=site)
    assert shown.returncode == 0 and "graft COMMAND" in shown.stdout and not shown.stderr
    assert run(graft, "--version", cwd=tmp_path, site=site).stdout.startswith("graft 0.")
    composed = run(
        graft, "train", "--cfg", "job", "-p", "router.top_k", "+recipe=mine", cwd=tmp_path, site=site
    )
    assert (composed.returncode, composed.stdout, composed.stderr) == (0, "3\n", "")


def test_models_of_transformers_import_beside_the_wheel(site: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.metadata as m, kernels\n"
        "assert 'graft-moe' in m.packages_distributions()['kernels'], kernels.__file__\n"
        "from transformers import MixtralConfig, MixtralForCausalLM\n"
        "print(kernels.__file__)\n"
    )
    done = run(sys.executable, "-c", code, cwd=tmp_path, site=site)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(site)


def test_the_version_is_none_that_transformers_takes_for_another_package() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    assert not (0, 18, 2) <= numbers <= (0, 19, 0)
