"""Reads each file of configs once: a run composes some thirty, and OmegaConf parses them in Python."""

from __future__ import annotations

import copy
import os
from io import TextIOWrapper
from typing import Any

from omegaconf import OmegaConf

_load = OmegaConf.load
_contents: dict[tuple[str, int, int], Any] = {}


def install() -> None:
    """Makes `OmegaConf.load` remember what open files hold, as long as they do not change."""
    OmegaConf.load = staticmethod(_load_once)


def _load_once(file: Any) -> Any:
    if not isinstance(file, TextIOWrapper):
        return _load(file)
    status = os.fstat(file.fileno())
    key = file.name, status.st_mtime_ns, status.st_size
    if key not in _contents:
        _contents[key] = _load(file)
    return copy.deepcopy(_contents[key])
