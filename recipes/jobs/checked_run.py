"""Composes and checks a run before anything of it starts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from moe.errors import ConfigError, Mistake, choose
from recipes.config.compose import compose_readable

if TYPE_CHECKING:
    from recipes.config.schema import RunConfig
    from recipes.jobs.base import Job


#: Returns mistakes of options that a job does not know.
Further: TypeAlias = "Callable[[RunConfig], Sequence[Mistake]]"


@dataclass(frozen=True)
class CheckedRun:
    """Run whose checks have passed.

    Attributes:
        config: Its typed config.
        values: The composed values.
        job: Its job.
        idle: Warning of options without effect; None where all have one.
    """

    config: RunConfig
    values: Mapping[str, Any]
    job: Job
    idle: str | None


def no_more(config: RunConfig) -> Sequence[Mistake]:
    """Returns no mistakes."""
    return ()


def check_command(
    overrides: Sequence[str], ranks: int | None = None, further: Further = no_more
) -> CheckedRun:
    """Composes and checks a run.

    Args:
        overrides: Those of the command line.
        ranks: Ranks that will be started; None for those that torchrun has started.
        further: Returns mistakes of options that the run's job does not know.

    Raises:
        ConfigError: Something is wrong; all mistakes at once.
    """
    values, config = _read(overrides)
    from recipes.jobs import job_classes
    from recipes.jobs.idle_options import idle_line

    jobs = job_classes()
    if config.job not in jobs:
        raise ConfigError.one("job", config.job, "there is no such job", choose(config.job, jobs))
    job = jobs[config.job]()
    mistakes = list(further(config))
    with _as_one_of(ranks):
        check = job.check_options if mistakes else job.check
        mistakes += check(config, int(os.environ.get("WORLD_SIZE", "1")))
    if mistakes:
        raise ConfigError(mistakes)
    return CheckedRun(config, values, job, idle_line(overrides, values, config, jobs))


def _read(overrides: Sequence[str]) -> tuple[dict[str, Any], RunConfig]:
    """Composes and reads a config; what is wrong in names, values and places is said at once."""
    values, mistakes = compose_readable(overrides)
    if values is None:
        raise ConfigError(mistakes)
    from recipes.config.schema import parse_config

    try:
        config = parse_config(values)
        if not mistakes:
            return values, config
    except ConfigError as error:
        mistakes += error.mistakes
    from recipes.config.places import check_places

    raise ConfigError([*mistakes, *check_places(values)])


@contextlib.contextmanager
def _as_one_of(ranks: int | None) -> Iterator[None]:
    """Makes the environment that of a rank while engines check what they have."""
    names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE") if ranks is not None else ()
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(ranks)))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
