"""Dispatch where every rank holds all experts: the plan's index suffices.

Letters: T tokens, D model width, K slots a token.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kernels.plan.row_plan import make_plan
from moe.dispatch.base import Dispatched, Dispatcher, DispatchHandle
from moe.types import Routing


@dataclass(frozen=True)
class _Arrived(DispatchHandle):
    """Tokens that need not travel."""

    sent: Dispatched

    def wait(self) -> Dispatched:
        """Returns at once."""
        return self.sent


class LocalDispatcher(Dispatcher):
    """Dispatcher without communication; the first expert product gathers by the plan."""

    name = "local"

    def start(self, x_TD: Tensor, routing: Routing) -> DispatchHandle:
        """Sorts the slots by expert; x stays in place."""
        plan = make_plan(routing.expert_ids_TK, routing.num_experts, routing.slot_mask_TK)
        weights_TK = routing.weights_TK
        if routing.slot_mask_TK is not None:
            weights_TK = weights_TK.masked_fill(~routing.slot_mask_TK, 0.0)
        return _Arrived(Dispatched(x_TD, weights_TK, plan))

    def combine(self, y_ND: Tensor, sent: Dispatched) -> Tensor:
        """Returns the rows: the experts have already summed over the slots."""
        return y_ND
