"""Composes the config of a run from ``conf/`` and the command line, by hydra."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moe.errors import ConfigError

CONF = Path(__file__).resolve().parent.parent / "conf"


def compose_config(overrides: Sequence[str]) -> dict[str, Any]:
    """The resolved values of a run.

    Args:
        overrides: As on the command line: ``+recipe=upcycle``, ``router.top_k=4``, ``router=sigmoid``.

    Raises:
        ConfigError: An option or a choice does not exist, or an override cannot be read.
    """
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("config", list(overrides))
        values: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    except (HydraException, OmegaConfBaseException) as error:
        raise _explain(error, overrides) from None
    if values["job"] is None:
        recipes = ", ".join(sorted(path.stem for path in (CONF / "recipe").glob("*.yaml")))
        raise ConfigError.one("recipe", None, "no recipe is chosen", f"Add +recipe=NAME, one of: {recipes}.")
    return values


def _explain(error: Exception, overrides: Sequence[str]) -> ConfigError:
    """hydra's message as path, value, rule and remedy, with the nearest option that exists."""
    # hydra wraps what it was stopped by, at times in an exception without a text.
    text = "\n".join(filter(None, (str(error), str(error.__cause__ or ""))))
    culprit = next((o for o in overrides if o.lstrip("+~").split("=")[0] in text), None)
    path, _, value = (culprit or "command line").lstrip("+~").partition("=")
    if re.search(r"Key '.*' is not in struct|Could not override", text):
        known = _all_keys(_defaults())
        near = difflib.get_close_matches(path, known, n=1) or _same_leaf(path, known)
        remedy = f"Did you mean {near[0]}?" if near else "Run train.py --cfg +recipe=upcycle to see them all."
        return ConfigError.one(path, value, "there is no such option", remedy)
    if "Could not find" in text or "Available options" in text:
        group = CONF / path
        choices = ", ".join(sorted(p.stem for p in group.glob("*.yaml"))) or "none"
        return ConfigError.one(path, value, "there is no such choice", f"Choose one of: {choices}.")
    first = " ".join(text.split())
    return ConfigError.one(path, value, first.rstrip("."), "See the option's form in train.py --cfg.")


def _same_leaf(path: str, known: Sequence[str]) -> list[str]:
    leaf = path.rpartition(".")[2]
    return [key for key in known if key.rpartition(".")[2] == leaf]


def _defaults() -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config")


def _all_keys(config: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for key, value in config.items_ex(resolve=False):
        keys.append(f"{prefix}{key}")
        if isinstance(value, DictConfig):
            keys += _all_keys(value, f"{prefix}{key}.")
    return keys


def to_yaml(values: dict[str, Any]) -> str:
    """The values as yaml text."""
    return OmegaConf.to_yaml(OmegaConf.create(values))
