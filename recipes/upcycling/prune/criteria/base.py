"""Contract of the criteria by which experts are kept.

Letters: E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from recipes.upcycling.reduce.expert_sums import ExpertSums


class Criterion(ABC):
    """Criterion of an expert's importance. It is found by being defined in a module of this package.

    Attributes:
        name: Name of the option.
        summary: What it is, as a clause.
    """

    name: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def scores_E(self, sums: ExpertSums, generator: Generator) -> Tensor:
        """Returns the ``[E]`` scores; experts of the highest are kept.

        Args:
            sums: Sums over the text.
            generator: Source of randomness, seeded for the layer.
        """
