"""Composes and checks a run before anything of it starts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from moe.errors import ConfigError, Mistake, choose
from recipes.config.compose import compose_readable, quoted
from recipes.config.schema import parse_config
from recipes.runtime.hub import Fetched

if TYPE_CHECKING:
    from recipes.config.schema import RunConfig
    from recipes.jobs.base import Job


#: Returns mistakes of options that a job does not know.
Further: TypeAlias = "Callable[[RunConfig], Sequence[Mistake]]"


@dataclass(frozen=True)
class CheckedRun:
    """Run whose options are right.

    Attributes:
        config: Its typed config.
        values: The composed values.
        job: Its job.
        overrides: Those of its command line.
        ranks: Ranks that will be started; None for those that torchrun has started.
        fetched: What came from the hub.
    """

    config: RunConfig
    values: Mapping[str, Any]
    job: Job
    overrides: Sequence[str]
    ranks: int | None
    fetched: Fetched

    def check_models(self) -> None:
        """Checks models, devices and libraries.

        Raises:
            ConfigError: Something is wrong; all mistakes at once.
        """
        with _as_one_of(self.ranks) as world_size:
            mistakes = self.job.check_models(self.config, world_size)
        if mistakes:
            raise ConfigError(mistakes)

    @property
    def rank_overrides(self) -> list[str]:
        """Overrides for ranks that are started: what came from the hub is named by its place in the cache."""
        return [self.fetched.override(text, quoted) for text in self.overrides]

    @property
    def idle(self) -> str | None:
        """Warning of options without effect; None where all have one."""
        from recipes.jobs import job_classes
        from recipes.jobs.idle_options import idle_line

        return idle_line(self.overrides, self.values, self.config, job_classes())


def no_more(config: RunConfig) -> Sequence[Mistake]:
    """Returns no mistakes."""
    return ()


def check_command(
    overrides: Sequence[str], ranks: int | None = None, further: Further = no_more
) -> CheckedRun:
    """Composes a run and checks its options, without torch.

    What the hub has is fetched between the two; weights last, once all other options are right.

    Args:
        overrides: Those of the command line.
        ranks: Ranks that will be started; None for those that torchrun has started.
        further: Returns mistakes of options that the run's job does not know.

    Raises:
        ConfigError: Something is wrong; all mistakes at once.
    """
    values, config = _read(overrides)
    fetched = Fetched(code=config.trust_remote_code)
    values = fetched.local(values)
    if fetched.places:
        config = parse_config(values)
    from recipes.jobs import job_classes

    jobs = job_classes()
    if config.job not in jobs:
        raise ConfigError.one("job", config.job, "there is no such job", choose(config.job, jobs))
    job = jobs[config.job]()
    with _as_one_of(ranks) as world_size:
        mistakes = [*further(config), *job.check_options(config, world_size)]
        if fetched.models:
            # What is wrong with models is known once they are whole.
            mistakes = [mistake for mistake in mistakes if mistake.path not in fetched.models.values()]
        if fetched.models and not mistakes:
            fetched.fetch_weights()
            mistakes = list(job.check_options(config, world_size))
    if mistakes:
        raise ConfigError(mistakes)
    return CheckedRun(config, values, job, overrides, ranks, fetched)


def _read(overrides: Sequence[str]) -> tuple[dict[str, Any], RunConfig]:
    """Composes and reads a config; what is wrong in names, values and places is said at once."""
    values, mistakes = compose_readable(overrides)
    if values is None:
        raise ConfigError(mistakes)
    try:
        config = parse_config(values)
        if not mistakes:
            return values, config
    except ConfigError as error:
        mistakes += error.mistakes
    from recipes.config.places import check_places

    raise ConfigError([*mistakes, *check_places(values)])


@contextlib.contextmanager
def _as_one_of(ranks: int | None) -> Iterator[int]:
    """Makes the environment that of a rank while engines check what they have; yields the number of ranks."""
    names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE") if ranks is not None else ()
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(ranks)))
    try:
        yield int(os.environ.get("WORLD_SIZE", "1"))
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
