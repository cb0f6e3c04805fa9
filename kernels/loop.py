"""The slow, obvious expert computation: one expert after the other, every dtype, gradients by autograd.

Every other back end is compared with this one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.activations import ACTIVATIONS
from kernels.backend import ExpertTensors, Workload
from kernels.plan import RowPlan


class LoopBackend:
    """Runs each expert on its rows with plain torch."""

    name = "loop"

    def refusal(self, work: Workload) -> str | None:
        """Runs everything."""
        return None

    def run(self, x_TD: Tensor, weights_TK: Tensor, plan: RowPlan, experts: ExpertTensors) -> Tensor:
        """See `kernels.backend.Backend.run`."""
        act = ACTIVATIONS[experts.activation].forward
        weight_R = weights_TK.reshape(-1)[plan.slot_R]
        out_TD = torch.zeros(x_TD.shape, dtype=torch.promote_types(x_TD.dtype, weight_R.dtype))
        out_TD = out_TD.to(x_TD.device)
        start = 0
        for e, count in enumerate(plan.counts_E.tolist()):
            rows = slice(start, start + count)
            start += count
            token = plan.token_R[rows]
            up = F.linear(x_TD[token], experts.w_up_EUD[e], _row(experts.b_up_EU, e))
            if experts.gated:
                gate, value = up.chunk(2, dim=-1)
                hidden = act(gate) * value
            else:
                hidden = act(up)
            y = F.linear(hidden, experts.w_down_EDF[e], _row(experts.b_down_ED, e))
            out_TD = out_TD.index_add(0, token, y * weight_R[rows, None])
        return out_TD.to(x_TD.dtype)


def _row(bias: Tensor | None, e: int) -> Tensor | None:
    return None if bias is None else bias[e]
