"""What moves tokens to their experts and back.

Letters: T tokens, D model width, K slots a token; N rows that arrive where the experts are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.distributed import ProcessGroup

from kernels.plan import RowPlan
from moe.types import Routing


@dataclass(frozen=True)
class Dispatched:
    """What arrived at the experts. Combine must be given it back: nothing is parked in between.

    Attributes:
        rows_ND: ``[N, D]`` token rows; an expert's rows are gathered by the plan's index, not copied here.
        weights_NK: ``[N, K]`` combine weights of the rows' slots.
        plan: Order of the routed rows by local expert.
    """

    rows_ND: Tensor
    weights_NK: Tensor
    plan: RowPlan


class Dispatcher(ABC):
    """Brings tokens to the ranks of their experts, and results home."""

    name: ClassVar[str]
    group: ProcessGroup | None = None
    """The ranks that hold a copy of all experts between them; None is this process alone."""

    @abstractmethod
    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        """Sends ``[T, D]`` tokens to where their experts are."""

    @abstractmethod
    def combine(self, y_ND: Tensor, sent: Dispatched) -> Tensor:
        """Brings ``[N, D]`` weighted sums home and adds them up: ``[T, D]``."""
