"""Experts on a CPU: one autograd node, rows sorted by expert, elementwise work in cache-sized groups.

What it saves for backward is x and the pre-activation H alone, as SonicMoE does on GPUs
(arXiv 2512.14080); the activation is recomputed, and the gradient of the combine weights is
``<dA', A>`` with ``dA' = dO W_down``, so that the expert outputs Y are never kept.

Matrix products run expert by expert where experts are large (at 256 rows an expert they reach 80% of a dense
product's rate) and in padded batches where they are small: see `kernels.cpu_groups`. Everything elementwise
runs once for a group of neighbouring experts, small enough to stay in cache and large enough that the cost of
a torch call vanishes.

Letters: T tokens, D model width, E experts, K slots a token, R routed rows, F expert width,
U = 2F when gated, else F; n rows of one group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.activations import ACTIVATIONS, Activation
from kernels.backend import ExpertTensors, Workload
from kernels.combine import combine_rows
from kernels.cpu_groups import GroupRows, RowGroup, row_groups, rows_times, weight_gradient
from kernels.plan import RowPlan


def _activate(h_nU: Tensor, act: Activation, gated: bool, out_nF: Tensor) -> Tensor:
    if not gated:
        return act.forward_out(h_nU, out_nF)
    gate, value = h_nU.chunk(2, dim=1)
    return act.forward_out(gate, out_nF).mul_(value)


class _ExpertMLP(torch.autograd.Function):
    """``out = sum_k w_k * expert_k(x)`` with a hand-written backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TK: Tensor,
        w_up_EUD: Tensor,
        w_down_EDF: Tensor,
        b_up_EU: Tensor | None,
        b_down_ED: Tensor | None,
        plan: RowPlan,
        activation: str,
        gated: bool,
    ) -> Tensor:
        R, F = plan.num_rows, w_down_EDF.shape[2]
        D, U = x_TD.shape[1], w_up_EUD.shape[1]
        act = ACTIVATIONS[activation]
        counts = plan.counts_E.tolist()
        h_RU = x_TD.new_empty(R, U)
        y_RD = x_TD.new_empty(R + plan.has_unused, D)
        if plan.has_unused:
            y_RD[R].zero_()
        size = x_TD.element_size()
        for group in row_groups(counts, (D + U + F) * size, _work_a_row(D, U, F), size):
            rows = slice(group.start, group.stop)
            x_nD = x_TD.index_select(0, plan.token_R[rows])
            rows_times(GroupRows(x_nD, group), w_up_EUD.transpose(1, 2), h_RU[rows])
            _add_bias(b_up_EU, group, h_RU)
            a_nF = _activate(h_RU[rows], act, gated, x_nD.new_empty(len(x_nD), F))
            rows_times(GroupRows(a_nF, group), w_down_EDF.transpose(1, 2), y_RD[rows])
            _add_bias(b_down_ED, group, y_RD)
        ctx.save_for_backward(x_TD, weights_TK, w_up_EUD, w_down_EDF, b_down_ED, h_RU)
        ctx.plan, ctx.counts, ctx.act, ctx.gated = plan, counts, act, gated
        ctx.has_b_up = b_up_EU is not None
        return combine_rows(y_RD, plan, weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        state = _Backward(ctx, grad_TD.contiguous())
        D, U, F, size = state.D, state.U, state.F, grad_TD.element_size()
        for group in row_groups(ctx.counts, 2 * (D + U + F) * size, _work_a_row(D, U, F), size):
            state.group(group)
        return (*state.gradients(), None, None, None)


class _Backward:
    """The buffers of one backward pass; `group` fills the part of some neighbouring experts."""

    def __init__(self, ctx: Any, grad_TD: Tensor) -> None:
        self.x_TD, self.weights_TK, self.w_up, self.w_down, self.b_down, self.h_RU = ctx.saved_tensors
        self.plan, self.act, self.gated, self.grad_TD = ctx.plan, ctx.act, ctx.gated, grad_TD
        self.D, self.U, self.F = self.x_TD.shape[1], self.w_up.shape[1], self.w_down.shape[2]
        R = self.plan.num_rows
        self.need = ctx.needs_input_grad
        self.scale_R = self.weights_TK.reshape(-1)[self.plan.slot_R].to(grad_TD.dtype)
        self.dscale_R = self.weights_TK.new_empty(R)
        self.dx_RD = grad_TD.new_empty(R + self.plan.has_unused, self.D) if self.need[0] else None
        if self.dx_RD is not None and self.plan.has_unused:
            self.dx_RD[R].zero_()
        empty = [e for e, count in enumerate(ctx.counts) if count == 0]
        self.dw_up = _gradient_like(self.w_up, empty) if self.need[2] else None
        self.dw_down = _gradient_like(self.w_down, empty) if self.need[3] else None
        self.db_up = self.w_up.new_zeros(self.w_up.shape[:2]) if self.need[4] and ctx.has_b_up else None
        self.db_down = torch.zeros_like(self.b_down) if self.need[5] and self.b_down is not None else None

    def group(self, group: RowGroup) -> None:
        rows = slice(group.start, group.stop)
        token_n = self.plan.token_R[rows]
        grad = GroupRows(self.grad_TD.index_select(0, token_n), group)
        da_nF = self.grad_TD.new_empty(len(token_n), self.F)
        rows_times(grad, self.w_down, da_nF)
        sa_nF, dh_nU = self._elementwise(rows, da_nF)
        if self.b_down is not None:
            self._down_bias(group, grad.rows_nK)
        if self.dw_down is not None:
            weight_gradient(grad, GroupRows(sa_nF, group), self.dw_down)
        dh = GroupRows(dh_nU, group)
        if self.dw_up is not None:
            weight_gradient(dh, GroupRows(self.x_TD.index_select(0, token_n), group), self.dw_up)
        if self.db_up is not None:
            for e, a, b in group.spans:
                self.db_up[e] = dh.of(a, b).sum(0)
        if self.dx_RD is not None:
            rows_times(dh, self.w_up, self.dx_RD[rows])

    def _elementwise(self, rows: slice, da_nF: Tensor) -> tuple[Tensor, Tensor]:
        """From ``dA' = dO W_down``: the combine weights' gradient, ``s * A`` and ``dH``."""
        h_nU, scale_n1 = self.h_RU[rows], self.scale_R[rows, None]
        dh_nU = torch.empty_like(h_nU)
        if not self.gated:
            a_nF = self.act.forward_out(h_nU, torch.empty_like(da_nF))
            self._weight_gradient(rows, da_nF, a_nF)
            self.act.backward_out(da_nF.mul_(scale_n1), h_nU, dh_nU)
            return a_nF.mul_(scale_n1), dh_nU
        gate, value = h_nU.chunk(2, dim=1)
        dgate, dvalue = dh_nU.chunk(2, dim=1)
        fgate_nF = self.act.forward_out(gate, torch.empty_like(da_nF))
        a_nF = fgate_nF * value
        self._weight_gradient(rows, da_nF, a_nF)
        da_nF.mul_(scale_n1)
        torch.mul(da_nF, fgate_nF, out=dvalue)
        self.act.backward_out(da_nF.mul_(value), gate, dgate)
        return a_nF.mul_(scale_n1), dh_nU

    def _weight_gradient(self, rows: slice, da_nF: Tensor, a_nF: Tensor) -> None:
        if self.need[1]:
            dots_n = torch.linalg.vecdot(da_nF, a_nF)
            self.dscale_R[rows] = dots_n

    def _down_bias(self, group: RowGroup, grad_nD: Tensor) -> None:
        """The bias of the down projection is part of Y: it enters both gradients on its own."""
        scaled_nD = grad_nD * self.scale_R[group.start : group.stop, None]
        for e, a, b in group.spans:
            local = slice(a - group.start, b - group.start)
            if self.need[1]:
                self.dscale_R[a:b] += grad_nD[local] @ self.b_down[e]
            if self.db_down is not None:
                self.db_down[e] = scaled_nD[local].sum(0)

    def gradients(self) -> tuple[Tensor | None, ...]:
        dx_TD = None if self.dx_RD is None else combine_rows(self.dx_RD, self.plan, None)
        dweights = None
        if self.need[1]:
            dweights = torch.zeros_like(self.weights_TK).view(-1)
            dweights[self.plan.slot_R] = self.dscale_R
            dweights = dweights.view_as(self.weights_TK)
        return dx_TD, dweights, self.dw_up, self.dw_down, self.db_up, self.db_down


def _work_a_row(D: int, U: int, F: int) -> float:
    """Multiplications of a row in a product: the mean of up and down."""
    return D * (U + F) / 2


def _add_bias(bias_EN: Tensor | None, group: RowGroup, out_RN: Tensor) -> None:
    if bias_EN is not None:
        for e, a, b in group.spans:
            out_RN[a:b] += bias_EN[e]


def _gradient_like(weight_E: Tensor, empty: list[int]) -> Tensor:
    """Uninitialised, except that experts without a row get exactly zero."""
    grad_E = torch.empty_like(weight_E)
    for e in empty:
        grad_E[e].zero_()
    return grad_E


class CpuBackend:
    """The fused CPU path: fp64, fp32 and bf16, forward and backward."""

    name = "cpu"

    def refusal(self, work: Workload) -> str | None:
        """Refuses other devices, and fp16, for which CPUs have no fast product."""
        if work.device.type != "cpu":
            return f"it runs on CPUs, and the weights are on {work.device.type}"
        if work.dtype not in (torch.float64, torch.float32, torch.bfloat16):
            return f"it runs fp64, fp32 and bf16, not {work.dtype}"
        return None

    def run(self, x_TD: Tensor, weights_TK: Tensor, plan: RowPlan, experts: ExpertTensors) -> Tensor:
        """See `kernels.backend.Backend.run`."""
        out: Tensor = _ExpertMLP.apply(  # type: ignore[no-untyped-call]
            x_TD.contiguous(),
            weights_TK,
            experts.w_up_EUD,
            experts.w_down_EDF,
            experts.b_up_EU,
            experts.b_down_ED,
            plan,
            experts.activation,
            experts.gated,
        )
        return out
