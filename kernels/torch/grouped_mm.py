"""Back end on `torch.nn.functional.grouped_mm`, for GPUs on which torch fuses it.

torch 2.13 fuses it for bf16 on compute capability 9.0 and 10.0; elsewhere it is a loop over experts with
a copy of the offsets to the host. It needs row and column strides that are multiples of 16 bytes.

Letters: T tokens, D model width, E experts, R routed rows, F expert width, U = 2F when gated, else F;
r rank; I and O any widths in and out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import ExpertTensors, Workload
from kernels.plan.row_plan import RowPlan
from kernels.torch.combine import combine_rows, gather_rows, only_used

_FUSED_CAPABILITIES = (9, 10)


class GroupedMMBackend:
    """Gather, two grouped products, and a gather-and-sum."""

    name = "grouped_mm"

    def unsupported_reason(self, work: Workload) -> str | None:
        """Rejects dtypes, strides, biases and gradient buffers that `F.grouped_mm` does not take."""
        if work.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"F.grouped_mm takes fp32, bf16 and fp16, not {work.dtype}"
        if work.has_bias:
            return "F.grouped_mm takes no bias"
        if work.accumulates:
            return "F.grouped_mm returns gradients in the dtype of the weights and adds them to nothing"
        widths = {
            "model width": work.model_width,
            "expert width": work.expert_width,
            "rank of the low-rank factors": work.low_rank,
        }
        for name, width in widths.items():
            if width * work.dtype.itemsize % 16:
                return f"the {name} {width} is not a multiple of 16 bytes in {work.dtype}"
        return None

    def is_fused(self, work: Workload) -> bool:
        """Returns whether torch runs one fused kernel rather than a loop over experts."""
        if work.device.type != "cuda" or work.dtype != torch.bfloat16:
            return False
        return torch.cuda.get_device_capability(work.device)[0] in _FUSED_CAPABILITIES

    def run(self, x_TD: Tensor, weights_TK: Tensor, plan: RowPlan, experts: ExpertTensors) -> Tensor:
        """See `kernels.backend.Backend.run`."""
        ends_E = plan.counts_E.cumsum(0).to(torch.int32)
        x_RD = gather_rows(x_TD, plan)
        low = experts.low_rank
        h_RU = F.grouped_mm(x_RD, experts.w_up_EUD.transpose(1, 2), offs=ends_E)
        if low is not None:
            h_RU = h_RU + low.scale * _low_rank(x_RD, low.a_up_ErD, low.b_up_EUr, ends_E)
        a_RF = experts.activate(h_RU)
        # F.grouped_mm rejects row strides that are not 16-byte aligned; the product above is contiguous.
        y_RD = F.grouped_mm(a_RF, experts.w_down_EDF.transpose(1, 2), offs=ends_E)
        if low is not None:
            y_RD = y_RD + low.scale * _low_rank(a_RF, low.a_down_ErF, low.b_down_EDr, ends_E)
        out: Tensor = CombineRows.apply(only_used(y_RD, plan), weights_TK, plan)  # type: ignore[no-untyped-call]
        return out


def _low_rank(rows_RI: Tensor, a_ErI: Tensor, b_EOr: Tensor, ends_E: Tensor) -> Tensor:
    """Computes ``B A x`` for every row as two products of rank r."""
    z_Rr = F.grouped_mm(rows_RI, a_ErI.transpose(1, 2), offs=ends_E)
    return F.grouped_mm(z_Rr, b_EOr.transpose(1, 2), offs=ends_E)


class CombineRows(torch.autograd.Function):
    """Autograd function of `combine_rows`, whose backward is a gather without atomics."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, weights_TK: Tensor, plan: RowPlan) -> Tensor:
        ctx.save_for_backward(y_RD, weights_TK)
        ctx.plan = plan
        if plan.has_unused:
            y_RD = torch.cat([y_RD, y_RD.new_zeros(1, y_RD.shape[1])])
        return combine_rows(y_RD, plan, weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        y_RD, weights_TK = ctx.saved_tensors
        plan = ctx.plan
        grad_RD = grad_TD.index_select(0, plan.token_R)
        scale_R1 = weights_TK.reshape(-1)[plan.slot_R, None]
        dweights = torch.zeros_like(weights_TK).view(-1)
        dweights[plan.slot_R] = (grad_RD * y_RD).sum(1, dtype=dweights.dtype)
        return (grad_RD * scale_R1).to(y_RD.dtype), dweights.view_as(weights_TK), None
