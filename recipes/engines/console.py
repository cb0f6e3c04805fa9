"""How the ranks of a run speak and act as one: a line is printed once, a file is written once."""

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
    """Prints on rank 0, and runs on rank 0 what only one rank may do.

    Attributes:
        engine: Open; knows the ranks.
        heartbeat: Is told of progress.
    """

    engine: Engine[Any]
    heartbeat: Heartbeat = field(default_factory=Heartbeat)

    @property
    def is_rank0(self) -> bool:
        """Whether this is rank 0, which writes and speaks."""
        return self.engine.rank == 0

    @property
    def lines(self) -> Lines:
        """`log` for work that may take long, and tells the watch of what it does between lines."""
        return Lines(self.log, self.heartbeat)

    def log(self, line: str) -> None:
        """Prints a line, on rank 0."""
        self.heartbeat.progress()
        if self.is_rank0:
            print(line, flush=True)

    def on_rank_zero(self, work: Callable[[], T]) -> T:
        """Does something on rank 0 while the others wait; its result, or its error, is everybody's."""
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
