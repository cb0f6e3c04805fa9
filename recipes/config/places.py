"""Checks of the files and folders that a config names, without the code that would use them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from moe.errors import Mistake
from recipes.data.config import DataConfig
from recipes.data.sources import check_paths
from recipes.models.hf.inspection import check_checkpoint


def check_places(values: Mapping[str, Any]) -> list[Mistake]:
    """Checks the files and folders that a config names, where the rest of it cannot be read."""
    mistakes = []
    with contextlib.suppress(ValidationError):  # the schema has reported it
        mistakes += check_paths(TypeAdapter(DataConfig).validate_python(values.get("data")))
    for name in ("output_dir", "cache_dir"):
        if isinstance(folder := values.get(name), str):
            mistakes += check_folder(name, folder)
    if isinstance(dense := values.get("dense"), str):
        mistakes += check_checkpoint(
            dense, "dense", trust_remote_code=values.get("trust_remote_code") is True
        )
    return mistakes


def check_folder(name: str, value: str) -> list[Mistake]:
    """Checks that a folder can be written or made.

    Args:
        name: Config path.
        value: The folder.
    """
    if not value:
        return [Mistake(name, value, "is empty", "Name a folder: . is the present one.")]
    try:
        folder = Path(value).expanduser().absolute()
        folder.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a NUL in it, an unknown user
        return [Mistake(name, value, f"it is no path ({error})", "Give another folder.")]
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir():
        return [Mistake(name, value, f"{existing} is a file", "Give another folder.")]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [Mistake(name, value, f"{existing} is not writable", "Give a folder that you may write to.")]
    return []
