"""What every job is, and what it is given. A recipe is a yaml file that names a job and sets its options."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from moe.errors import Mistake
from recipes.config.schema import RunConfig
from recipes.engines import Engine
from recipes.engines.console import RankConsole
from recipes.jobs.run_dir import RunDir
from recipes.runtime.heartbeat import Heartbeat, Lines
from recipes.runtime.interrupt import StopRequest
from recipes.tracking.goodput import GoodputLedger
from recipes.tracking.trackers import RunLogger
from recipes.training.training_loop import Loop

T = TypeVar("T")


@dataclass(frozen=True)
class Session:
    """A run in progress.

    Attributes:
        config: What it was told.
        values: The same as composed, for ``config.yaml``.
        engine: Open.
        run_dir: Where it lives.
        stop: Whether it was asked to stop.
        logger: Takes rows.
        loop: Trains legs.
        started: When the command started, by ``time.time()``.
        ledger: What the run's time went into; None on the ranks that do not write.
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
        """How its ranks speak and act as one."""
        return RankConsole(self.engine, self.heartbeat)

    @property
    def is_rank0(self) -> bool:
        """Whether this is rank 0, which writes and speaks."""
        return self.engine.rank == 0

    @property
    def heartbeat(self) -> Heartbeat:
        """Is told of where the run is."""
        return self.loop.guards.heartbeat

    @property
    def lines(self) -> Lines:
        """`log` for work that may take long, and tells the watch of what it does between lines."""
        return self.console.lines

    def log(self, line: str) -> None:
        """Prints a line, on rank 0."""
        self.console.log(line)

    def on_rank_zero(self, work: Callable[[], T]) -> T:
        """Does something on rank 0 while the others wait; its result, or its error, is everybody's."""
        return self.console.on_rank_zero(work)


class Job(ABC):
    """One kind of run. Found by being in a module of `recipes.jobs`."""

    name: ClassVar[str]

    @abstractmethod
    def check(self, config: RunConfig, world_size: int) -> list[Mistake]:
        """Every mistake that shows before anything expensive starts: seconds, no weights read."""

    def identity(self, config: RunConfig) -> dict[str, Any]:
        """Returns the options of its own, by path, that a run may not change when it goes on."""
        return {}

    @abstractmethod
    def run(self, session: Session) -> bool:
        """Does it; returns whether it came to its end (False: it was asked to stop)."""
