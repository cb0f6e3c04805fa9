"""Reference back end: one expert after the other in plain torch, in every dtype, gradients by autograd.

Every other back end is compared with it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import ExpertTensors, Workload
from kernels.plan.row_plan import RowPlan


class LoopBackend:
    """Plain loop that runs each expert on its rows."""

    name = "loop"

    def unsupported_reason(self, work: Workload) -> str | None:
        """Returns None: every workload is supported."""
        return None

    def run(self, x_TD: Tensor, weights_TK: Tensor, plan: RowPlan, experts: ExpertTensors) -> Tensor:
        """See `kernels.backend.Backend.run`."""
        weight_R = weights_TK.reshape(-1)[plan.slot_R]
        out_TD = torch.zeros(x_TD.shape, dtype=torch.promote_types(x_TD.dtype, weight_R.dtype))
        out_TD = out_TD.to(x_TD.device)
        start = 0
        for e, count in enumerate(plan.counts_E.tolist()):
            rows = slice(start, start + count)
            start += count
            token = plan.token_R[rows]
            y_nD = _expert(x_TD[token], experts, e)
            out_TD = out_TD.index_add(0, token, y_nD * weight_R[rows, None])
        return out_TD.to(x_TD.dtype)


def _expert(x_nD: Tensor, experts: ExpertTensors, e: int) -> Tensor:
    w_up, w_down, low = experts.w_up_EUD[e], experts.w_down_EDF[e], experts.low_rank
    if experts.main_grads is not None:
        w_up = _AddedGradient.apply(w_up, experts.main_grads.w_up_EUD[e])  # type: ignore[no-untyped-call]
        w_down = _AddedGradient.apply(  # type: ignore[no-untyped-call]
            w_down, experts.main_grads.w_down_EDF[e]
        )
    h_nU = F.linear(x_nD, w_up, _row(experts.b_up_EU, e))
    if low is not None:
        h_nU = h_nU + low.scale * F.linear(F.linear(x_nD, low.a_up_ErD[e]), low.b_up_EUr[e])
    a_nF = experts.activate(h_nU)
    y_nD = F.linear(a_nF, w_down, _row(experts.b_down_ED, e))
    if low is not None:
        y_nD = y_nD + low.scale * F.linear(F.linear(a_nF, low.a_down_ErF[e]), low.b_down_EDr[e])
    return y_nD


def _row(bias: Tensor | None, e: int) -> Tensor | None:
    return None if bias is None else bias[e]


class _AddedGradient(torch.autograd.Function):
    """Identity of a weight that adds its gradient to a buffer instead of passing it on."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, buffer: Tensor) -> Tensor:
        ctx.buffer = buffer
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        ctx.buffer.add_(grad)
        return None, None
