"""Tells without torch, where that can be, that torch sees no GPU."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import sys
from pathlib import Path

#: Library of NVIDIA's driver, without which CUDA's runtime finds no GPU.
_DRIVER = "libcuda.so.1"


def lacks_gpu() -> bool:
    """Returns True where torch is sure to see no GPU. False says nothing, unless torch is imported already.

    A build of torch for CPUs sees none, nor does one for CUDA on a machine without NVIDIA's driver.
    """
    if (torch := sys.modules.get("torch")) is not None:
        return not torch.cuda.is_available()
    built = _built_for()
    if built == {"cuda"}:
        try:
            ctypes.CDLL(_DRIVER)
        except OSError:
            return True
    return built == set()


def _built_for() -> set[str] | None:
    """Returns which of cuda and hip the installed torch is built for; None where that is not known."""
    spec = importlib.util.find_spec("torch")
    file = Path((spec.origin if spec else None) or "").with_name("version.py")
    if not file.is_file():
        return None
    found = re.findall(r"^(cuda|hip)\b[^=\n]*= *(.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    versions = dict(found)
    return {name for name, version in versions.items() if version != "None"} if len(versions) == 2 else None
