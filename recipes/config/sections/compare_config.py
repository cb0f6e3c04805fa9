"""Section of the baseline that a run is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from recipes.config.sections import Section


@dataclass(frozen=True)
class CompareConfig(Section):
    """Config of the baseline."""

    name: ClassVar[str] = "compare"
    cpt: bool | Literal["auto"] = "auto"
    """Train the dense model on the same tokens as well (continued pre-training)? ``auto``: with the default
    model, and not with a checkpoint of your own."""

    def trains_cpt(self, dense: str | None) -> bool:
        """Tells if the dense model is trained on as a baseline.

        Args:
            dense: The run's dense checkpoint; None for the default model.
        """
        return dense is None if self.cpt == "auto" else self.cpt
