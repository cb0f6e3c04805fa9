"""Names the options that a user has set and that have no effect in the run.

Plug-ins declare it where the option is: by `Config.idle` of their config, and by `Job.sections`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from moe.types import Config
from recipes.config.owners import listed
from recipes.config.search_path import choices_of

if TYPE_CHECKING:
    from recipes.config.schema import RunConfig
    from recipes.jobs.base import Job

_MOST_NAMED = 12


def idle_line(
    overrides: Sequence[str], values: Mapping[str, Any], config: RunConfig, jobs: Mapping[str, type[Job]]
) -> str | None:
    """Returns the line that names options without effect; None where all that is set has one.

    Args:
        overrides: The command line; what it and the recipe's file set counts as set by the user.
        values: The composed values.
        config: The typed config.
        jobs: Every job by its name.
    """
    idle = {**_sections_of_others(config, jobs), **idle_options(config)}
    found: dict[str, list[str]] = {}
    for path in written_options(overrides, values):
        parts = path.split(".")
        prefixes = [".".join(parts[: n + 1]) for n in range(len(parts))]
        if reason := next((idle[prefix] for prefix in prefixes if prefix in idle), None):
            found.setdefault(reason, []).append(path)
    if not found:
        return None
    return "warning: without effect in this run: " + "; ".join(
        f"{_listed(paths)} ({reason})" for reason, paths in found.items()
    )


def _listed(paths: Sequence[str]) -> str:
    more = len(paths) - _MOST_NAMED
    return ", ".join(paths[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def idle_options(config: Config, prefix: str = "") -> dict[str, str]:
    """Returns every option below a config that has no effect, by path, with the reason."""
    found = {f"{prefix}{name}": reason for name, reason in config.idle().items()}
    for name, value in _parts(config):
        found |= idle_options(value, f"{prefix}{name}.")
    return found


def _parts(config: Config) -> Iterator[tuple[str, Config]]:
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if isinstance(value, Config):
            yield field.name, value
        elif field.name == "sections":
            yield from value.items()


def _sections_of_others(config: RunConfig, jobs: Mapping[str, type[Job]]) -> dict[str, str]:
    """Returns the sections that only other jobs read."""
    readers: dict[str, list[str]] = {}
    for name, job in jobs.items():
        for section in job.sections:
            readers.setdefault(section.name, []).append(name)
    return {
        section: f"only the job {listed(names, 'or')} reads it"
        for section, names in readers.items()
        if config.job not in names
    }


def written_options(overrides: Sequence[str], values: Mapping[str, Any]) -> list[str]:
    """Returns the paths of the options that the command line and its recipe set, in their order.

    Args:
        overrides: The command line.
        values: The composed values, whose leaves an override of a whole section names.
    """
    found: dict[str, None] = {}
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key == "recipe":
            found |= dict.fromkeys(_recipe_options(value, overrides))
        elif not override.startswith("~") and "@" not in key and not choices_of(key, overrides):
            found |= dict.fromkeys(_leaves(key, _at(values, key)))
    return list(found)


def _recipe_options(name: str, overrides: Sequence[str]) -> list[str]:
    file = choices_of("recipe", overrides).get(name)
    content = yaml.safe_load(file.read_text(encoding="utf-8")) if file else None
    given = {key: value for key, value in (content or {}).items() if key not in ("defaults", "job")}
    return [leaf for key, value in given.items() for leaf in _leaves(key, value)]


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def _leaves(path: str, value: Any) -> list[str]:
    if not isinstance(value, Mapping) or not value:
        return [path]
    return [leaf for key, inner in value.items() for leaf in _leaves(f"{path}.{key}", inner)]
