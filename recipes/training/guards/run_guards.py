"""Guards of a run, as they are passed to the training loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from recipes.runtime.config import FaultsConfig
from recipes.runtime.heartbeat import Heartbeat


@dataclass(frozen=True)
class RunGuards:
    """Guards of a run.

    Attributes:
        faults: Rules by which steps are skipped and the run ends.
        folder: The run directory, in which bad batches are recorded; None records none.
        heartbeat: Told where training is.
    """

    faults: FaultsConfig = field(default_factory=FaultsConfig)
    folder: Path | None = None
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
