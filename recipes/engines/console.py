"""Console of a run with several ranks: a line is printed once, and a file is written once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from moe.errors import GraftError
from recipes.engines.base import Engine
from recipes.runtime.heartbeat import Heartbeat, Lines

T = TypeVar("T")


@dataclass(frozen=True)
class RankConsole:
    """Console that prints on rank 0, and runs on rank 0 what only one rank may do.

    Attributes:
        engine: The open engine of the run.
        heartbeat: Told of progress.
    """

    engine: Engine[Any]
    heartbeat: Heartbeat = field(default_factory=Heartbeat)

    @property
    def is_rank0(self) -> bool:
        """True on rank 0, which prints and writes."""
        return self.engine.rank == 0

    @property
    def lines(self) -> Lines:
        """`log` for long work, which also reports to the heartbeat between lines."""
        return Lines(self.log, self.heartbeat)

    def log(self, line: str) -> None:
        """Prints a line, on rank 0."""
        self.heartbeat.progress()
        if self.is_rank0:
            print(line, flush=True)

    def on_rank_zero(self, work: Callable[[], T]) -> T:
        """Runs ``work`` on rank 0 while the others wait; all ranks return its result, or raise its error."""
        result: T | None = None
        error: GraftError | None = None
        if self.is_rank0:
            try:
                result = work()
            except GraftError as caught:
                error = caught
        result, error = self.engine.broadcast((result, error))
        if error is not None:
            raise error
        return result  # type: ignore[return-value]
