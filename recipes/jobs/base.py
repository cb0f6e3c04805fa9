"""Base class of jobs, and the run that a job is given. A recipe names a job and sets its options."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from recipes.config.sections import Section

if TYPE_CHECKING:
    from moe.errors import Mistake
    from recipes.config.schema import RunConfig
    from recipes.engines.base import Engine
    from recipes.engines.console import RankConsole
    from recipes.jobs.run_dir import RunDir
    from recipes.runtime.interrupt import StopRequest
    from recipes.tracking.goodput import GoodputLedger
    from recipes.tracking.trackers import RunLogger
    from recipes.training.training_loop import Loop


@dataclass(frozen=True)
class Session:
    """Run in progress; jobs pass its parts on.

    Attributes:
        config: Typed config.
        values: The same as composed, for ``config.yaml``.
        engine: Open engine.
        run_dir: Run directory.
        stop: Asks for an early end.
        logger: Writes rows of metrics.
        loop: Trains stages.
        started: Time of the command, by `steady_time`.
        ledger: Account of the run's time; None on the ranks that do not write.
    """

    config: RunConfig
    values: Mapping[str, Any]
    engine: Engine[Any]
    run_dir: RunDir
    stop: StopRequest
    logger: RunLogger
    loop: Loop
    started: float
    ledger: GoodputLedger | None = None

    @property
    def console(self) -> RankConsole:
        """The run's ranks, which print and act as one."""
        from recipes.engines.console import RankConsole

        return RankConsole(self.engine, self.loop.guards.heartbeat)


class Job(ABC):
    """Kind of run, found by being in a module ``recipes/jobs/NAME_job.py``, which imports no torch.

    Attributes:
        name: The value of ``job`` that picks this class.
        sections: Sections of the config that it reads, of those that not every job reads.
    """

    name: ClassVar[str]
    sections: ClassVar[tuple[type[Section], ...]] = ()

    @abstractmethod
    def check_options(self, config: RunConfig, world_size: int) -> list[Mistake]:
        """Returns all mistakes that options and the names of files show; it imports no torch."""

    def check(self, config: RunConfig, world_size: int) -> list[Mistake]:
        """Returns all mistakes that show before anything expensive starts, in seconds.

        Models, devices and libraries are looked at only for options without mistakes.
        """
        return self.check_options(config, world_size) or self.check_models(config, world_size)

    def check_models(self, config: RunConfig, world_size: int) -> list[Mistake]:
        """Returns the mistakes that models, devices and libraries show, of options that are right."""
        return []

    def models(self, config: RunConfig) -> tuple[str, ...]:
        """Returns the models in the summary of a finished run, by which it is known; empty if unknown."""
        return ()

    def identity(self, config: RunConfig) -> dict[str, Any]:
        """Returns the options of its own, by path, that a run may not change when it goes on."""
        return {}

    @abstractmethod
    def run(self, session: Session) -> bool:
        """Runs the job; returns False when it was asked to stop before its end."""
