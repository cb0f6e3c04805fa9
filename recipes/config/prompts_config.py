"""Which prompts the experts' router rows are made from, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.errors import require
from moe.types import Config


@dataclass(frozen=True)
class PromptsConfig(Config):
    """Config of router rows from prompts; without a path the router draws its rows.

    The idea is mergekit's ``gate_mode: hidden``. Rows here are made of what the router will read, the input
    of the feed-forward network behind its norm, and of real tokens alone.
    """

    path: str | None = None
    """A YAML or JSON file: for each expert ``positive_prompts`` and, if any, ``negative_prompts``, lists of
    texts; as a list, or below ``experts`` as in a config of mergekit."""
    take: Literal["mean", "last"] = "mean"
    """Of a prompt's tokens."""
    centre: bool = True
    """Whether the mean over experts is taken off: what all prompts share tells no expert from another."""
    scale: float = 1.0
    """Length of a row. Inputs behind an RMSNorm have length about sqrt(D), so that logits stay below
    ``scale * sqrt(D)``."""

    def __post_init__(self) -> None:
        """Checks the values that need no file.

        Raises:
            ValueError: One line for each value that breaks its rule, with what to do instead.
        """
        require(
            self,
            (self.path != "", "path", "is empty", "Name a file, or leave it at null."),
            (self.scale > 0, "scale", "must be above 0", "1 is usual."),
        )
