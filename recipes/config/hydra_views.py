"""Shows a config as hydra does: ``--cfg``, ``--info`` and shell completion."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Sequence

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moe.errors import ConfigError
from recipes.config.compose import compose_config, compose_tree, full_overrides
from recipes.config.search_path import CONF


def config_text(
    kind: str, overrides: Sequence[str], package: str | None = None, *, resolve: bool = False
) -> str:
    """Returns what ``--cfg`` prints.

    Args:
        kind: ``job``, ``hydra`` or ``all``.
        overrides: Those of the command line.
        package: Part of the config; None for all of it.
        resolve: Whether interpolations are resolved.

    Raises:
        ConfigError: The overrides are wrong, there is no such package, or something cannot be resolved.
    """
    compose_config(overrides)
    config = compose_tree(overrides, hydra=kind != "job")
    if kind == "hydra":
        config = OmegaConf.masked_copy(config, ["hydra"])
    try:
        if package is None:
            return OmegaConf.to_yaml(config, resolve=resolve)
        part = OmegaConf.select(config, package)
        if isinstance(part, DictConfig):
            return f"# @package {package}\n{OmegaConf.to_yaml(part, resolve=resolve)}"
    except OmegaConfBaseException as error:
        rule = " ".join(str(error).split()).rstrip(".")
        raise ConfigError.one("--cfg", kind, rule, "Name a package with -p, or omit --resolve.") from None
    if part is not None:
        return f"{part}\n"
    near = difflib.get_close_matches(package, [str(key) for key in config], n=1)
    remedy = f"Did you mean {near[0]}?" if near else "Leave it out to see all of it."
    raise ConfigError.one("--package", package, "the config has no such part", remedy)


def show_info(kind: str, overrides: Sequence[str]) -> None:
    """Prints what ``--info`` does: defaults list, search path, plugins.

    Raises:
        ConfigError: The overrides are wrong.
    """
    compose_config(overrides)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None, "it was just initialized"
        hydra.show_info(kind, "config", full_overrides(overrides))


def complete(command: Sequence[str]) -> None:
    """Prints a script of shell completion, or the completions that such a script asks for.

    Args:
        command: ``install=SHELL``, ``uninstall=SHELL`` or ``query=SHELL``.

    Raises:
        ConfigError: There is no such shell or command.
    """
    with initialize_config_dir(str(CONF), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None, "it was just initialized"
        # What is typed is completed from all sections and from the user's folders.
        program = r"^(\s*(?:\S*python3?\s+)?\S+)"
        line = os.environ.get("COMP_LINE", "")
        os.environ["COMP_LINE"] = re.sub(
            program, lambda found: " ".join([found[1], *full_overrides([])]), line
        )
        # A script is for a program of one word.
        sys.argv[0] = sys.argv[0].partition(" ")[0]
        try:
            hydra.shell_completion("config", list(command))
        except ValueError as error:
            rule = " ".join(str(error).split()).rstrip(".")
            given = " ".join(command) or None
            raise ConfigError.one("-sc", given, rule, "Write -sc install=bash, zsh or fish.") from None
