"""Ways of running an engine that show what it can do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineLayout:
    """One way of running the job.

    Attributes:
        ranks: Processes.
        options: Of ``train.py``: the engine and how its ranks are laid out.
    """

    ranks: int
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        """For people and as a folder."""
        told = [option.removeprefix("engine.").removeprefix("engine=") for option in self.options]
        return f"{self.ranks} {'rank' if self.ranks == 1 else 'ranks'}, {', '.join(told)}"
