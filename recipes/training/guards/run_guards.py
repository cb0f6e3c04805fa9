"""What guards a run, as the training loop is given it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from recipes.runtime.config import FaultsConfig
from recipes.runtime.heartbeat import Heartbeat


@dataclass(frozen=True)
class RunGuards:
    """The guards of a run.

    Attributes:
        faults: When steps are skipped, and when the run ends.
        folder: The run directory, where bad batches are written down; None writes none.
        heartbeat: Is told where training is.
    """

    faults: FaultsConfig = field(default_factory=FaultsConfig)
    folder: Path | None = None
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
