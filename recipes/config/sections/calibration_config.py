"""Section of the calibration: the text that a dense model reads before it becomes an MoE model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moe.errors import require
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
            (self.batch_size >= 1, "batch_size", "must be at least 1", "Raise it."),
            (self.save_every >= 0, "save_every", "must be at least 0", "Raise it."),
            (self.max_gib > 0, "max_gib", "leaves no memory", "Set it above 0."),
        )
