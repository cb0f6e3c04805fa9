"""Section of the second of two stages; everything else is as in the first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moe.errors import at_least, require
from recipes.config.sections import Section


@dataclass(frozen=True)
class Stage2Config(Section):
    """Config of the second stage of ``job: two_stage``: the first's weights, other data, a new optimizer."""

    name: ClassVar[str] = "stage2"
    path: str | list[str] | None = None
    """Data of the stage, in the format of ``data.path``."""
    validation_path: str | list[str] | None = None
    """Documents to validate on; None takes some of ``path``, ``data.validation_fraction`` of it."""
    steps: int = 600
    """Optimizer steps."""
    lr: float = 2e-5
    """Learning rate at the top of its schedule."""
    warmup_steps: int = 18
    """Optimizer steps before the full learning rate is reached; where no option of a command sets them, at
    most a fifth of the stage."""

    def __post_init__(self) -> None:
        require(
            self,
            (self.path not in ("", []), "path", "is empty", "Name files or a glob."),
            (
                self.validation_path not in ("", []),
                "validation_path",
                "is empty",
                "Name files or a glob, or leave it at null.",
            ),
            *at_least(self, 1, "steps"),
            (self.lr >= 0, "lr", "must be 0 or more", "2e-5 is usual."),
            (self.warmup_steps >= 0, "warmup_steps", "must be 0 or more", "Give 0 for none."),
        )
