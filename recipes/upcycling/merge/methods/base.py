"""Contract of the methods by which experts are merged.

Letters: D model width, E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from recipes.upcycling.reduce.expert_sums import ExpertSums


class MergeMethod(ABC):
    """Method that merges experts. It is found by being defined in a module of this package.

    Attributes:
        name: Name of the option.
        summary: What it does, as a clause.
        aligns: Whether neurons are brought into the order of the expert that stays.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    aligns: ClassVar[bool]

    @abstractmethod
    def likeness_EE(self, sums: ExpertSums, rows_ED: Tensor) -> Tensor:
        """Returns how alike two experts are, ``[E, E]``: others join the one that stays and is most alike.

        Args:
            sums: Sums over the text.
            rows_ED: The router's rows.
        """
