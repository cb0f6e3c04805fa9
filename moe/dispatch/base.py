"""What moves tokens to their experts and back.

Letters: T tokens, D model width, K slots a token; N rows that arrive where the experts are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from torch import Tensor
from torch.distributed import ProcessGroup

from kernels.plan.row_plan import RowPlan
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


DispatchHandle: TypeAlias = Callable[[], Dispatched]
"""Waits until tokens that are under way have arrived. To be called once."""


class Dispatcher(ABC):
    """Brings tokens to the ranks of their experts, and results home."""

    name: ClassVar[str]
    group: ProcessGroup | None = None
    """The ranks that hold a copy of all experts between them; None is this process alone."""

    @abstractmethod
    def start(self, x_TD: Tensor, routing: Routing) -> DispatchHandle:
        """Sends ``[T, D]`` tokens on their way to where their experts are, and does not wait for them.

        What is computed between this call and that of the result runs while they travel; in backward, while
        their gradients do.
        """

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        """Sends ``[T, D]`` tokens to where their experts are."""
        return self.start(x_TD, routing)()

    @abstractmethod
    def combine(self, y_ND: Tensor, sent: Dispatched) -> Tensor:
        """Brings ``[N, D]`` weighted sums home and adds them up: ``[T, D]``."""
