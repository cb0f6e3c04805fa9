"""Contract of the shares that experts have in the dense network.

Letters: E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from recipes.upcycling.reduce.expert_sums import ExpertSums


class Shares(ABC):
    """Shares of experts in a mean. They are found by being defined in a module of this package.

    Attributes:
        name: Name of the option.
        summary: What they are, as a clause.
    """

    name: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def shares_E(self, sums: ExpertSums) -> Tensor:
        """Returns the ``[E]`` fp64 shares, whose sum is 1.

        Args:
            sums: Sums over the text.
        """
