"""Base of the dispatchers, which move tokens to their experts and back.

Letters: T tokens, D model width, K slots a token; N rows that arrive where the experts are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.distributed import ProcessGroup

from kernels.plan.row_plan import RowPlan
from moe.types import Routing


@dataclass(frozen=True)
class Dispatched:
    """Tokens that arrived at the experts. `Dispatcher.combine` needs it back: dispatchers hold no state.

    Attributes:
        rows_ND: ``[N, D]`` token rows. The plan's index gathers an expert's rows; they are not copied here.
        weights_NK: ``[N, K]`` combine weights of the rows' slots.
        plan: Order of the routed rows by local expert.
    """

    rows_ND: Tensor
    weights_NK: Tensor
    plan: RowPlan


class DispatchHandle(ABC):
    """Tokens on their way to their experts."""

    @abstractmethod
    def wait(self) -> Dispatched:
        """Waits until the tokens have arrived; call it once."""


class Dispatcher(ABC):
    """Moves tokens to the ranks of their experts, and results back."""

    name: ClassVar[str]
    group: ProcessGroup | None = None
    """The ranks that together hold all experts once; None for this process alone."""

    @abstractmethod
    def start(self, x_TD: Tensor, routing: Routing) -> DispatchHandle:
        """Starts sending ``[T, D]`` tokens to their experts, without waiting for them.

        Computation between this call and `DispatchHandle.wait` overlaps with the transfer; in backward, with
        that of the gradients.
        """

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        """Sends ``[T, D]`` tokens to their experts and waits for them."""
        return self.start(x_TD, routing).wait()

    @abstractmethod
    def combine(self, y_ND: Tensor, sent: Dispatched) -> Tensor:
        """Returns the ``[N, D]`` weighted sums to their tokens and adds them up: ``[T, D]``."""
