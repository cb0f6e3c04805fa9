"""Packages that only some runs need, by the extra that brings each; and one that has the name of ours."""

from __future__ import annotations

import importlib.util
import sys
from importlib import metadata

from moe.errors import Mistake

DISTRIBUTION = "graft-moe"
#: Extra of the distribution -> the module for which it is there. An extra of an engine has the engine's name.
EXTRAS = {"deepspeed": "deepspeed", "megatron": "megatron.core", "wandb": "wandb", "real": "gguf"}


def is_there(module: str) -> bool:
    """Returns whether a module can be found; nothing of it is imported, but for its parents."""
    if sys.modules.get(module) is not None:
        return True
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent is not there
        return False


def install_line(extra: str) -> str:
    """Returns the command that installs an extra."""
    return f'pip install "{DISTRIBUTION}[{extra}]"'


def check_extra(extra: str, path: str, value: object, instead: str) -> Mistake | None:
    """Checks that the package of an extra is installed.

    Args:
        extra: One of `EXTRAS`.
        path: The option that needs it.
        value: Value of the option.
        instead: What can be done without it, as the end of a sentence.
    """
    module = EXTRAS[extra]
    if is_there(module):
        return None
    rule = f"it needs the package {module.replace('.', '-')}, which is not installed"
    return Mistake(path, value, rule, f"Run {install_line(extra)}, or {instead}.")


def check_names() -> list[Mistake]:
    """Rejects a PyPI package with the name of one of ours: transformers would import ours for it."""
    version = installed_version("kernels")
    if version is None:
        return []
    rule = "this package of PyPI has the name of Graft's own, and transformers takes one for the other"
    return [Mistake("kernels", version, rule, "Run pip uninstall kernels, and install Graft again.")]


def installed_version(package: str) -> str | None:
    """Returns the version of a distribution; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
