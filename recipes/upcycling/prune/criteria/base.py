"""Contract of the criteria by which experts are kept.

Letters: E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Generator, Tensor


@dataclass(frozen=True)
class ExpertSums:
    """Sums over the tokens of a text, for the experts of one layer.

    Attributes:
        counts_E: ``[E]`` fp64 tokens that are routed to each.
        norms_E: ``[E]`` fp64 sums of the L2 norms of their outputs.
        weighted_E: ``[E]`` fp64 sums of these norms times the combine weights.
    """

    counts_E: Tensor
    norms_E: Tensor
    weighted_E: Tensor


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
