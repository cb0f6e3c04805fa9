"""Dispatch where every rank holds all experts: the plan's index is all that is needed.

Letters: T tokens, D model width, K slots a token.
"""

from __future__ import annotations

from torch import Tensor

from kernels.plan.row_plan import make_plan
from moe.dispatch.base import Dispatched, Dispatcher, DispatchHandle
from moe.types import Routing


class LocalDispatcher(Dispatcher):
    """Communication is the identity; the first expert product gathers by the plan."""

    name = "local"

    def start(self, x_TD: Tensor, routing: Routing) -> DispatchHandle:
        """Sorts the slots by expert; x stays where it is."""
        plan = make_plan(routing.expert_ids_TK, routing.num_experts, routing.slot_mask_TK)
        weights_TK = routing.weights_TK
        if routing.slot_mask_TK is not None:
            weights_TK = weights_TK.masked_fill(~routing.slot_mask_TK, 0.0)
        sent = Dispatched(x_TD, weights_TK, plan)
        return lambda: sent

    def combine(self, y_ND: Tensor, sent: Dispatched) -> Tensor:
        """The experts have already summed over the slots."""
        return y_ND
