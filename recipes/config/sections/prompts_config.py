"""Section of the prompts from which router rows are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from moe.errors import require
from moe.types import unless
from recipes.config.sections import Section


@dataclass(frozen=True)
class PromptsConfig(Section):
    """Config of router rows from prompts; without a path the router draws its rows.

    The idea is mergekit's ``gate_mode: hidden``. Rows here are made of what the router will read, the input
    of the feed-forward network behind its norm, and of real tokens alone.
    """

    name: ClassVar[str] = "prompts"
    path: str | None = None
    """A YAML or JSON file: for each expert ``positive_prompts`` and, if any, ``negative_prompts``, lists of
    texts; as a list, or below ``experts`` as in a config of mergekit."""
    take: Literal["mean", "last"] = "mean"
    """Reduction over a prompt's tokens."""
    centre: bool = True
    """Subtract the mean over experts? Features that all prompts share distinguish no expert."""
    scale: float = 1.0
    """Length of a row. Inputs behind an RMSNorm have length about sqrt(D), so that logits stay below
    ``scale * sqrt(D)``."""

    def __post_init__(self) -> None:
        require(
            self,
            (self.path != "", "path", "is empty", "Name a file, or leave it at null."),
            (self.scale > 0, "scale", "must be above 0", "1 is usual."),
        )

    def idle(self) -> dict[str, str]:
        """Returns the options without effect; see `Config.idle`."""
        return unless(self.path is not None, "prompts.path is null", "take", "centre", "scale")
