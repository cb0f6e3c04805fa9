"""Composes the config of a run from ``conf/`` and the command line, by hydra."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moe.errors import ConfigError, Mistake, choose
from recipes.config.owners import options_of_choices, owner_mistake
from recipes.config.renamed import check_name
from recipes.config.search_path import (
    CONF,
    SEARCH_PATH,
    check_search_path,
    check_shadows,
    choices_of,
    search_path,
)
from recipes.config.warm_up import scale_warm_ups

# What hydra raises over an override: its own errors, and those of its code that met a value of another type.
_ERRORS = (HydraException, OmegaConfBaseException, ValueError, TypeError, AttributeError, LookupError)
_ERRORS += (AssertionError, RecursionError)
#: Recipe of a command that names none, and no job.
DEFAULT_RECIPE = "upcycle"


def with_recipe(overrides: Sequence[str]) -> tuple[str, ...]:
    """Returns the overrides of a command, with the default recipe where nothing of them sets a job."""
    if {"recipe", "job"} & {_key(override) for override in overrides}:
        return tuple(overrides)
    try:
        if _compose(overrides)["job"] is not None:  # a choice of the user's own folders sets it
            return tuple(overrides)
    except _ERRORS:
        pass  # what is wrong is said of the whole
    return (f"+recipe={DEFAULT_RECIPE}", *overrides)


def compose_config(overrides: Sequence[str]) -> dict[str, Any]:
    """Composes the resolved values of a run.

    Args:
        overrides: As on the command line: ``+recipe=upcycle``, ``router.top_k=4``, ``router=sigmoid``.

    Raises:
        ConfigError: Options or choices do not exist, or overrides cannot be read; all of them at once.
    """
    values, mistakes = compose_readable(overrides)
    if values is None or mistakes:
        raise ConfigError(mistakes)
    return values


def compose_readable(overrides: Sequence[str]) -> tuple[dict[str, Any] | None, list[Mistake]]:
    """Composes the overrides that are right.

    Args:
        overrides: As for `compose_config`.

    Returns:
        The resolved values, None where nothing can be composed; and the mistakes of the other overrides.
    """
    unreadable = {
        override: mistake
        for override in overrides
        if (mistake := check_name(override) or _unreadable(override) or _without_effect(override))
    }
    mistakes = list(unreadable.values())
    remaining = [override for override in overrides if override not in unreadable]
    if missing := check_search_path(remaining):
        return None, [*mistakes, *missing]
    while True:
        try:
            values = _compose(remaining)
            break
        except _ERRORS as error:
            # hydra stops at the first mistake: without what caused it, it goes on to the next one.
            culprit = _culprit(error, remaining)
            mistakes.append(_explain(error, culprit, remaining))
            if culprit is None:
                return None, mistakes
            removed = _key(culprit)
            remaining = [o for o in remaining if o != culprit and not _key(o).startswith(f"{removed}.")]
    mistakes = mistakes or _shadowed(remaining)
    if values["job"] is None:
        recipes = ", ".join(choices_of("recipe", remaining))
        none = Mistake("recipe", None, "no recipe is chosen", f"Add +recipe=NAME, one of: {recipes}.")
        return None, mistakes or [none]
    scale_warm_ups(values, overrides)
    return values, mistakes


def _compose(overrides: Sequence[str]) -> dict[str, Any]:
    config = compose_tree(overrides)
    values: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    return values


def compose_tree(overrides: Sequence[str], *, hydra: bool = False) -> DictConfig:
    """Composes the config without resolving it; with ``hydra``, with hydra's own part."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", full_overrides(overrides), return_hydra_config=hydra)


def full_overrides(overrides: Sequence[str]) -> list[str]:
    """Returns the overrides that hydra is given: those of the command line, all sections, the search path."""
    path = ",".join(quoted(entry) for entry in search_path(overrides))
    own = [override for override in overrides if _key(override) != SEARCH_PATH]
    return [_sections(), *([f"{SEARCH_PATH}=[{path}]"] if path else []), *own]


def _shadowed(overrides: Sequence[str]) -> list[Mistake]:
    if not search_path(overrides):
        return []
    return check_shadows(compose_tree(overrides, hydra=True).hydra.runtime.choices, overrides)


def quoted(value: str) -> str:
    """Writes any text, such as a path, so that an override has it as it stands.

    hydra reads ``=``, commas, brackets and blanks, and OmegaConf interpolations, where they are not quoted.
    """
    # Backslashes count before a quote alone, and hydra's end with one.
    text = re.sub(r"(\\*)(\"|$)", lambda found: found[1] * 2 + ("\\" + found[2]) * bool(found[2]), value)
    text = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", text)
    return f'"{text}"'


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _unreadable(override: str) -> Mistake | None:
    """Returns the mistake in the form of an override, whatever it sets; None when there is none."""
    path, equals, value = override.lstrip("+~").partition("=")
    if not equals and not override.startswith("~"):
        return Mistake("command line", override, "this sets nothing", "Write OPTION=VALUE.")
    if "\0" in override or any("\ud800" <= character <= "\udfff" for character in override):
        # Bytes that are no UTF-8 come as lone surrogates: no record of the run could be written with them.
        rule = "it holds a zero byte, or bytes that are not UTF-8"
        return Mistake(ascii(path)[1:-1], value, rule, "Rename what it names, or leave them out.")
    remedy = f"Quote it, with the shell's quotes outside: {shlex.quote(f'{path}={quoted(value)}')}"
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        return Mistake(path, value, "it holds characters that have a meaning of their own", f"{remedy}.")
    if parsed.is_sweep_override():
        remedy += f", write a list: {shlex.quote(f'{path}=[{value}]')}, or add -m for a run of each."
        return Mistake(path, value, "a comma outside of a list", remedy)
    return None


def _without_effect(override: str) -> Mistake | None:
    """Rejects options of hydra's that would do nothing: Graft composes by it, and starts runs itself."""
    path, _, value = override.lstrip("+~").partition("=")
    if path.partition(".")[0].partition("/")[0] != "hydra" or path == SEARCH_PATH:
        return None
    remedy = f"Leave it out; there are {SEARCH_PATH}, and output_dir and run.name for the run directory."
    return Mistake(
        path, value, "Graft starts its runs itself, and this option of hydra's does nothing", remedy
    )


def _text(error: Exception) -> str:
    # hydra wraps what it was stopped by, at times in an exception without a text. Its search path names
    # folders of this machine, which are not what an override is looked for in.
    text = "\n".join(filter(None, (str(error), str(error.__cause__ or ""))))
    return text.partition("Config search path:")[0]


def _culprit(error: Exception, overrides: Sequence[str]) -> str | None:
    """Finds the override that caused an error of hydra's."""
    text = _text(error)
    for override in overrides:
        if re.search(rf"(?<![\w.]){re.escape(_key(override))}(?![\w.]*\w)", text):
            return override
    # Some messages name nothing: then it is the one that cannot be composed on its own.
    for override in overrides:
        try:
            _compose([override])
        except _ERRORS:
            return override
    return None


def _explain(error: Exception, culprit: str | None, overrides: Sequence[str]) -> Mistake:
    """Translates hydra's error, and suggests the nearest option that exists."""
    text = _text(error)
    path, _, value = (culprit or "command line").lstrip("+~").partition("=")
    if "No match in the defaults list" in text and choices_of(path, overrides):
        return Mistake(path, value, "it is chosen with a plus", f"Write +{path}={value}.")
    if re.search(r"Key '.*' is not in struct|Could not override", text):
        return _no_option(path, value, _choice(path.partition(".")[0], overrides))
    if culprit is not None and (choices := choices_of(path, overrides)):
        return Mistake(path, value, "there is no such choice", choose(value, choices))
    first = " ".join(text.split())
    return Mistake(path, value, first.rstrip("."), "See the option's form in graft train --cfg.")


def _no_option(path: str, value: str, chosen: str | None) -> Mistake:
    """Says whose option it is, or which one is nearest in name, and whose that is."""
    if owned := owner_mistake(path, chosen):
        return Mistake(path, value, *owned)
    known = [key for key in _all_keys(_defaults()) if not path.startswith(f"{key}.")]
    others = options_of_choices(path.partition(".")[0]) - {*known}
    near = difflib.get_close_matches(path, [*known, *sorted(others)], n=1) or _same_leaf(path, known)
    remedy = f"Did you mean {near[0]}?" if near else "Run graft train --cfg to see them all."
    if near and near[0] in others and (owned := owner_mistake(near[0], chosen)):
        rule, how = owned
        remedy += f" {rule[0].upper()}{rule[1:]}. {how}"
    return Mistake(path, value, "there is no such option", remedy)


def _choice(group: str, overrides: Sequence[str]) -> str | None:
    """Returns the choice of a group that overrides, or the recipe, make; None where that is not known."""
    made = [o.partition("=")[2] for o in overrides if _key(o) == group]
    if made:
        return made[-1]
    recipes = [o for o in overrides if _key(o) == "recipe"]
    try:
        section = _compose(recipes)[group]
    except _ERRORS:
        return None
    name = section.get("name") if isinstance(section, dict) else None
    return name if isinstance(name, str) else None


def _same_leaf(path: str, known: Sequence[str]) -> list[str]:
    leaf = path.rpartition(".")[2]
    return [key for key in known if key.rpartition(".")[2] == leaf]


def _defaults() -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", [_sections()])


def _sections() -> str:
    """Returns the override that adds the sections of all jobs and methods, before recipes change them."""
    names = ",".join(sorted(path.stem for path in (CONF / "section").glob("*.yaml")))
    return f"+section=[{names}]"


def _all_keys(config: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for key, value in config.items_ex(resolve=False):
        keys.append(f"{prefix}{key}")
        if isinstance(value, DictConfig):
            keys += _all_keys(value, f"{prefix}{key}.")
    return keys


def to_yaml(values: dict[str, Any]) -> str:
    """Formats the values as yaml."""
    return OmegaConf.to_yaml(OmegaConf.create(values))
