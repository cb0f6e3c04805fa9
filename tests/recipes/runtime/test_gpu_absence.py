"""A build of torch for CPUs, or a machine without NVIDIA's driver, has no GPU; nothing else is sure."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from recipes.runtime.gpu_absence import lacks_gpu
from tests.grid import each

VERSION = "cuda: Optional[str] = {cuda}\ngit_version = 'e'\nhip: Optional[str] = {hip}\n"


@each(
    "text, driver, lacks",
    [
        (VERSION.format(cuda=None, hip=None), True, True),
        (VERSION.format(cuda="'13.0'", hip=None), True, False),
        (VERSION.format(cuda="'13.0'", hip=None), False, True),
        # ROCm's driver has another name.
        (VERSION.format(cuda=None, hip="'7.1'"), False, False),
        ("cuda = None\n", False, False),
        (None, False, False),
    ],
    ids=["CPU build", "CUDA and driver", "CUDA without driver", "ROCm", "another form", "no file"],
)
def test_only_what_is_sure_is_said(
    text: str | None, driver: bool, lacks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version.py").unlink(missing_ok=True)
    if text is not None:
        (tmp_path / "version.py").write_text(text, encoding="utf-8")
    spec = ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))

    def load(name: str) -> None:
        if not driver:
            raise OSError(f"{name}: cannot open shared object file")

    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "torch")
        patch.setattr(importlib.util, "find_spec", lambda name: spec)
        patch.setattr(ctypes, "CDLL", load)
        assert lacks_gpu() is lacks


def test_torch_is_asked_where_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lacks_gpu() is not torch.cuda.is_available()
    for seen in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda seen=seen: seen)
        assert lacks_gpu() is not seen


def test_the_installed_torch_says_of_itself_what_its_file_says(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "torch")
        unseen = lacks_gpu()
    # Sure of no GPU only where torch sees none; a CPU build always is.
    assert not (unseen and torch.cuda.is_available())
    assert unseen or torch.version.cuda is not None or torch.version.hip is not None
