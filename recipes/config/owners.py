"""Finds whose an option is that the chosen plug-ins do not have: the files of a group say what each has."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import yaml

from recipes.config.search_path import choices_of

# Every section is part of every config, and a recipe is none.
_NOT_CHOSEN = ("recipe", "section")


def owner_mistake(path: str, chosen: str | None = None) -> tuple[str, str] | None:
    """Returns rule and remedy for an option that other choices of its group have; None where none has it.

    Args:
        path: The option, as in ``engine.zero_stage``.
        chosen: The choice of the run, where it is known.
    """
    group, _, option = path.partition(".")
    names = [name for name, options in _choices(group).items() if option in options and name != chosen]
    if not option or not names:
        return None
    has = "" if chosen is None else f", and this run has {group}={chosen}"
    owners = listed([f"{group}={name}" for name in names], "and")
    remedy = f"Set {group}={names[0]} to use it, or leave it out."
    return f"it is an option of {owners}{has}", remedy


def options_of_choices(group: str) -> set[str]:
    """Returns the paths of the options that the choices of a group have of their own."""
    return {f"{group}.{option}" for options in _choices(group).values() for option in options}


def listed(names: list[str], word: str) -> str:
    """Returns a list in words, the last name behind ``and`` or ``or``; of many names the first three."""
    shown = names if len(names) <= 4 else [*names[:3], f"{len(names) - 3} others"]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} {word} {shown[-1]}"


@functools.cache
def _choices(group: str) -> Mapping[str, frozenset[str]]:
    """Returns the options that each choice of a group has of its own, nested ones with dots."""
    if not group.isidentifier() or group in _NOT_CHOSEN:
        return {}
    return {name: frozenset(_options(group, name)) for name in choices_of(group)}


def _options(group: str, choice: str) -> list[str]:
    content = yaml.safe_load(choices_of(group)[choice].read_text(encoding="utf-8"))
    bases = [base for base in content.get("defaults", ()) if isinstance(base, str) and base != "_self_"]
    return [*_paths(content), *(option for base in bases for option in _options(group, base))]


def _paths(content: Any, prefix: str = "") -> list[str]:
    found = []
    for key, value in content.items() if isinstance(content, dict) else ():
        if key != "defaults":
            found += [f"{prefix}{key}", *_paths(value, f"{prefix}{key}.")]
    return found
