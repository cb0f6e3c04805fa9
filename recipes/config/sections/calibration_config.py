"""Section of the calibration: the text that a dense model reads before it becomes an MoE model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moe.errors import at_least, require
from recipes.config.sections import Section


@dataclass(frozen=True)
class CalibrationConfig(Section):
    """Config of the calibration; only methods that ask for statistics run one."""

    name: ClassVar[str] = "calibration"
    path: str | list[str] | None = None
    """Text, in any form that ``data.path`` has; None takes the run's first training samples."""
    samples: int = 256
    """Samples of ``data.seq_len`` tokens; a statistic that needs another's result passes over them again."""
    batch_size: int = 8
    """Samples of a forward pass, over all ranks."""
    save_every: int = 50
    """Batches between states that a stopped calibration goes on from; 0 saves when asked to stop alone."""
    max_gib: float = 16.0
    """Memory that the statistics of all layers may take on a rank, in GiB."""

    def __post_init__(self) -> None:
        require(
            self,
            (self.path not in ("", []), "path", "is empty", "Name files or a glob, or leave it at null."),
            (self.samples >= 1, "samples", "must be at least 1", "Raise it; 256 is little."),
            *at_least(self, 1, "batch_size"),
            *at_least(self, 0, "save_every"),
            (self.max_gib > 0, "max_gib", "leaves no memory", "Set it above 0."),
        )
