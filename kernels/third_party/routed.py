"""Converts our plan of the rows to the forms that other libraries take.

Letters: T tokens, D model width, E experts, K slots a token, R routed rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.plan.row_plan import RowPlan


@dataclass(frozen=True)
class Routed:
    """Tokens, weights and a plan in which every slot is used.

    Attributes:
        x_TD: ``[T, D]`` tokens.
        weights_TK: ``[T, K]`` combine weights.
        slot_R: ``[T * K]`` int64, the flat slot of each row in expert order.
        expert_R: ``[T * K]`` int64, the expert of each row.
        ends_E: ``[E]`` int64, the row after each expert's last.
        token_T: The token of the layer that each row of `x_TD` is a copy of; None: `x_TD` is the layer's own.
    """

    x_TD: Tensor
    weights_TK: Tensor
    slot_R: Tensor
    expert_R: Tensor
    ends_E: Tensor
    token_T: Tensor | None = None

    @property
    def ids_TK(self) -> Tensor:
        """``[T, K]`` int64, the expert of each slot."""
        ids_N = torch.empty_like(self.expert_R)
        ids_N[self.slot_R] = self.expert_R
        return ids_N.view(self.weights_TK.shape)

    def back(self, out_TD: Tensor, num_tokens: int) -> Tensor:
        """Returns the layer's output from that of these tokens, summing the copies of each token."""
        if self.token_T is None:
            return out_TD
        wide = torch.promote_types(out_TD.dtype, torch.float32)
        sum_TD = torch.zeros(num_tokens, out_TD.shape[1], dtype=wide, device=out_TD.device)
        return sum_TD.index_add(0, self.token_T, out_TD.to(wide)).to(out_TD.dtype)


def every_slot_used(x_TD: Tensor, weights_TK: Tensor, plan: RowPlan) -> Routed:
    """Converts a plan for libraries that have no unused slots.

    Without a mask nothing is copied. With one, every routed row becomes a token with a single slot: R rows
    of x are copied, and padding rows are zeros with weight zero after the last expert's rows.
    """
    E, R = plan.num_experts, plan.num_rows
    ends_E = plan.counts_E.cumsum(0)
    row_R = torch.arange(R, device=ends_E.device)
    expert_R = torch.searchsorted(ends_E, row_R, right=True)
    if not plan.has_unused:
        return Routed(x_TD, weights_TK, plan.slot_R, expert_R, ends_E)
    used_R1 = (row_R < ends_E[-1])[:, None]
    x_RD = x_TD.index_select(0, plan.token_R).masked_fill(~used_R1, 0)
    weights_R1 = weights_TK.reshape(-1)[plan.slot_R, None].masked_fill(~used_R1, 0)
    ends_E = torch.cat([ends_E[:-1], ends_E.new_full((1,), R)])
    return Routed(x_RD, weights_R1, row_R, expert_R.clamp(max=E - 1), ends_E, plan.token_R)
