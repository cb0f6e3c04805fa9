"""Experts on a CPU: one autograd node, rows sorted by expert, elementwise work in cache-sized groups.

What it saves for backward is x and the pre-activation H alone, as SonicMoE does on GPUs
(arXiv 2512.14080); the activation is recomputed, and the gradient of the combine weights is
``<dA', A>`` with ``dA' = dO W_down``, so that the expert outputs Y are never kept. Low-rank factors add their
``[R, r]`` rows.

Matrix products run expert by expert where experts are large (at 256 rows an expert they reach 80% of a dense
product's rate) and in padded batches where they are small: see `kernels.cpu.cpu_groups`. Everything
elementwise runs once for a group of neighbouring experts, small enough to stay in cache and large enough that
the cost of a torch call vanishes.

Letters: T tokens, D model width, E experts, K slots a token, R routed rows, F expert width,
U = 2F when gated, else F; r rank; n rows of one group; I and O any widths in and out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.activations import Activation
from kernels.backend import ExpertTensors, MainGrads
from kernels.cpu.cpu_groups import (
    GroupRows,
    RowGroup,
    add_rows_times,
    add_weight_gradient,
    row_groups,
    rows_times,
    weight_gradient,
)
from kernels.plan.row_plan import RowPlan
from kernels.torch.combine import combine_rows


def _activate(h_nU: Tensor, act: Activation, gated: bool, out_nF: Tensor) -> Tensor:
    if not gated:
        return act.forward_out(h_nU, out_nF)
    gate, value = h_nU.chunk(2, dim=1)
    return act.forward_out(gate, out_nF).mul_(act.forward(value) if act.on_value else value)


class Weights(NamedTuple):
    """Everything of the experts that may carry a gradient, in the order of `ExpertMLP.forward`."""

    w_up_EUD: Tensor
    w_down_EDF: Tensor
    b_up_EU: Tensor | None
    b_down_ED: Tensor | None
    low_a_up_ErD: Tensor | None
    low_b_up_EUr: Tensor | None
    low_a_down_ErF: Tensor | None
    low_b_down_EDr: Tensor | None

    @staticmethod
    def of(experts: ExpertTensors) -> Weights:
        """Those of a layer; None for what it does not have."""
        low = experts.low_rank
        factors = (None,) * 4 if low is None else (low.a_up_ErD, low.b_up_EUr, low.a_down_ErF, low.b_down_EDr)
        return Weights(experts.w_up_EUD, experts.w_down_EDF, experts.b_up_EU, experts.b_down_ED, *factors)


@dataclass(frozen=True)
class Kind:
    """What is known of the experts besides their weights.

    Attributes:
        act: Their activation.
        gated: Whether they have a gate.
        scale: Of the low-rank products.
        main_grads: Where the gradients of w_up and w_down are added; None where they are returned.
    """

    act: Activation
    gated: bool
    scale: float
    main_grads: MainGrads | None


class ExpertMLP(torch.autograd.Function):
    """``out = sum_k w_k * expert_k(x)`` with a hand-written backward."""

    @staticmethod
    def forward(
        ctx: Any, plan: RowPlan, kind: Kind, x_TD: Tensor, weights_TK: Tensor, *weights: Tensor | None
    ) -> Tensor:
        w = Weights(*weights)  # type: ignore[arg-type]
        R, F = plan.num_rows, w.w_down_EDF.shape[2]
        D, U = x_TD.shape[1], w.w_up_EUD.shape[1]
        counts = plan.counts_E.tolist()
        h_RU = x_TD.new_empty(R, U)
        y_RD = x_TD.new_empty(R + plan.has_unused, D)
        if plan.has_unused:
            y_RD[R].zero_()
        z_up_Rr, z_down_Rr = _low_rows(x_TD, R, w.low_a_up_ErD), _low_rows(x_TD, R, w.low_a_down_ErF)
        size = x_TD.element_size()
        for group in row_groups(counts, (D + U + F) * size, _work_a_row(D, U, F), size):
            rows = slice(group.start, group.stop)
            x_nD = x_TD.index_select(0, plan.token_R[rows])
            x = GroupRows(x_nD, group)
            rows_times(x, w.w_up_EUD.transpose(1, 2), h_RU[rows])
            _add_low_rank(x, w.low_a_up_ErD, w.low_b_up_EUr, kind.scale, _at(z_up_Rr, rows), h_RU[rows])
            _add_bias(w.b_up_EU, group, h_RU)
            a_nF = _activate(h_RU[rows], kind.act, kind.gated, x_nD.new_empty(len(x_nD), F))
            a = GroupRows(a_nF, group)
            rows_times(a, w.w_down_EDF.transpose(1, 2), y_RD[rows])
            _add_low_rank(a, w.low_a_down_ErF, w.low_b_down_EDr, kind.scale, _at(z_down_Rr, rows), y_RD[rows])
            _add_bias(w.b_down_ED, group, y_RD)
        ctx.save_for_backward(x_TD, weights_TK, h_RU, z_up_Rr, z_down_Rr, *weights)
        ctx.plan, ctx.counts, ctx.kind = plan, counts, kind
        return combine_rows(y_RD, plan, weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *BackwardPass(ctx, grad_TD.contiguous()).run()


class BackwardPass:
    """The buffers of one backward pass; `group` fills the part of some neighbouring experts."""

    def __init__(self, ctx: Any, grad_TD: Tensor) -> None:
        self.x_TD, self.weights_TK, self.h_RU, self.z_up_Rr, self.z_down_Rr, *weights = ctx.saved_tensors
        self.w = Weights(*weights)
        self.plan, self.kind, self.grad_TD = ctx.plan, ctx.kind, grad_TD
        self.D, self.U, self.F = self.x_TD.shape[1], self.w.w_up_EUD.shape[1], self.w.w_down_EDF.shape[2]
        R = self.plan.num_rows
        _, _, need_x, self.need_weights, *needs = ctx.needs_input_grad
        self.need = Weights(*needs)
        self.scale_R = self.weights_TK.reshape(-1)[self.plan.slot_R].to(grad_TD.dtype)
        # No expert writes the rows that pad a plan.
        new = self.weights_TK.new_zeros if self.plan.is_padded else self.weights_TK.new_empty
        self.dscale_R = new(R)
        self.dx_RD = grad_TD.new_empty(R + self.plan.has_unused, self.D) if need_x else None
        if self.dx_RD is not None and self.plan.has_unused:
            self.dx_RD[R].zero_()
        self.counts = ctx.counts
        empty = [e for e, count in enumerate(self.counts) if count == 0]
        returned = [need and (i > 1 or self.kind.main_grads is None) for i, need in enumerate(self.need)]
        self.dw = Weights(
            *(_gradient_like(w, empty) if need else None for w, need in zip(self.w, returned, strict=True))  # type: ignore[arg-type]
        )

    def run(self) -> tuple[Tensor | None, ...]:
        """The gradients of x, the combine weights, and `Weights`."""
        D, U, F, size = self.D, self.U, self.F, self.grad_TD.element_size()
        for group in row_groups(self.counts, 2 * (D + U + F) * size, _work_a_row(D, U, F), size):
            self.group(group)
        return self.gradients()

    def group(self, group: RowGroup) -> None:
        rows = slice(group.start, group.stop)
        token_n = self.plan.token_R[rows]
        grad = GroupRows(self.grad_TD.index_select(0, token_n), group)
        da_nF = self.grad_TD.new_empty(len(token_n), self.F)
        rows_times(grad, self.w.w_down_EDF, da_nF)
        u_down = self._low_rank_back(grad, self.w.low_a_down_ErF, self.w.low_b_down_EDr, da_nF)
        sa_nF, dh_nU = self._elementwise(rows, da_nF)
        if self.w.b_down_ED is not None:
            self._down_bias(group, grad.rows_nK)
        sa, dh = GroupRows(sa_nF, group), GroupRows(dh_nU, group)
        if self.need.w_down_EDF:
            self._weight(grad, sa, "w_down_EDF")
        if self.dw.low_a_down_ErF is not None:
            assert u_down is not None
            weight_gradient(u_down, sa, self.dw.low_a_down_ErF)
        if self.dw.low_b_down_EDr is not None:
            sz_nr = self.z_down_Rr[rows] * self.scale_R[rows, None]
            weight_gradient(grad, GroupRows(sz_nr, group), self.dw.low_b_down_EDr)
        self._up(group, dh)

    def _up(self, group: RowGroup, dh: GroupRows) -> None:
        """What follows from the gradient of the pre-activation."""
        rows = slice(group.start, group.stop)
        dx_nD = None if self.dx_RD is None else self.dx_RD[rows]
        if dx_nD is not None:
            rows_times(dh, self.w.w_up_EUD, dx_nD)
        needs_x = self.need.w_up_EUD or self.need.low_a_up_ErD
        if needs_x or dx_nD is not None:
            u_up = self._low_rank_back(dh, self.w.low_a_up_ErD, self.w.low_b_up_EUr, dx_nD)
        if needs_x:
            x = GroupRows(self.x_TD.index_select(0, self.plan.token_R[rows]), group)
            if self.need.w_up_EUD:
                self._weight(dh, x, "w_up_EUD")
            if self.dw.low_a_up_ErD is not None:
                assert u_up is not None
                weight_gradient(u_up, x, self.dw.low_a_up_ErD)
        if self.dw.low_b_up_EUr is not None:
            weight_gradient(dh, GroupRows(self.z_up_Rr[rows], group), self.dw.low_b_up_EUr)
        if self.dw.b_up_EU is not None:
            for e, a, b in group.spans:
                self.dw.b_up_EU[e] = dh.of(a, b).sum(0)

    def _weight(self, left: GroupRows, right: GroupRows, name: Literal["w_up_EUD", "w_down_EDF"]) -> None:
        """The gradient of a whole weight, where it is to be."""
        if self.kind.main_grads is not None:
            add_weight_gradient(left, right, getattr(self.kind.main_grads, name))
        else:
            weight_gradient(left, right, getattr(self.dw, name))

    def _low_rank_back(
        self, grad: GroupRows, a_ErI: Tensor | None, b_EOr: Tensor | None, out_nI: Tensor | None
    ) -> GroupRows | None:
        """``u = scale * grad B`` of the group, with ``u A`` added to out."""
        if a_ErI is None or b_EOr is None:
            return None
        u_nr = grad.rows_nK.new_empty(len(grad.rows_nK), a_ErI.shape[1])
        rows_times(grad, b_EOr, u_nr)
        u = GroupRows(u_nr.mul_(self.kind.scale), grad.group)
        if out_nI is not None:
            add_rows_times(u, a_ErI, out_nI)
        return u

    def _elementwise(self, rows: slice, da_nF: Tensor) -> tuple[Tensor, Tensor]:
        """From ``dA' = dO W_down``: the combine weights' gradient, ``s * A`` and ``dH``."""
        h_nU, scale_n1 = self.h_RU[rows], self.scale_R[rows, None]
        dh_nU = torch.empty_like(h_nU)
        if not self.kind.gated:
            a_nF = self.kind.act.forward_out(h_nU, torch.empty_like(da_nF))
            self._weight_gradient(rows, da_nF, a_nF)
            self.kind.act.backward_out(da_nF.mul_(scale_n1), h_nU, dh_nU)
            return a_nF.mul_(scale_n1), dh_nU
        gate, value = h_nU.chunk(2, dim=1)
        dgate, dvalue = dh_nU.chunk(2, dim=1)
        fgate_nF = self.kind.act.forward_out(gate, torch.empty_like(da_nF))
        fvalue_nF = self.kind.act.forward(value) if self.kind.act.on_value else value
        a_nF = fgate_nF * fvalue_nF
        self._weight_gradient(rows, da_nF, a_nF)
        da_nF.mul_(scale_n1)
        torch.mul(da_nF, fgate_nF, out=dvalue)
        if self.kind.act.on_value:
            self.kind.act.backward_out(dvalue, value, dvalue)
        self.kind.act.backward_out(da_nF.mul_(fvalue_nF), gate, dgate)
        return a_nF.mul_(scale_n1), dh_nU

    def _weight_gradient(self, rows: slice, da_nF: Tensor, a_nF: Tensor) -> None:
        if self.need_weights:
            dots_n = torch.linalg.vecdot(da_nF, a_nF)
            self.dscale_R[rows] = dots_n

    def _down_bias(self, group: RowGroup, grad_nD: Tensor) -> None:
        """The bias of the down projection is part of Y: it enters both gradients on its own."""
        scaled_nD = grad_nD * self.scale_R[group.start : group.stop, None]
        for e, a, b in group.spans:
            local = slice(a - group.start, b - group.start)
            if self.need_weights:
                assert self.w.b_down_ED is not None
                self.dscale_R[a:b] += grad_nD[local] @ self.w.b_down_ED[e]
            if self.dw.b_down_ED is not None:
                self.dw.b_down_ED[e] = scaled_nD[local].sum(0)

    def gradients(self) -> tuple[Tensor | None, ...]:
        dx_TD = None if self.dx_RD is None else combine_rows(self.dx_RD, self.plan, None)
        dweights = None
        if self.need_weights:
            dweights = torch.zeros_like(self.weights_TK).view(-1)
            dweights[self.plan.slot_R] = self.dscale_R
            dweights = dweights.view_as(self.weights_TK)
        return dx_TD, dweights, *self.dw


def _work_a_row(D: int, U: int, F: int) -> float:
    """Multiplications of a row in a product: the mean of up and down."""
    return D * (U + F) / 2


def _add_bias(bias_EN: Tensor | None, group: RowGroup, out_RN: Tensor) -> None:
    if bias_EN is not None:
        for e, a, b in group.spans:
            out_RN[a:b] += bias_EN[e]


def _low_rows(x_TD: Tensor, num_rows: int, a_ErI: Tensor | None) -> Tensor | None:
    return None if a_ErI is None else x_TD.new_empty(num_rows, a_ErI.shape[1])


def _at(low_Rr: Tensor | None, rows: slice) -> Tensor | None:
    return None if low_Rr is None else low_Rr[rows]


def _add_low_rank(
    rows: GroupRows,
    a_ErI: Tensor | None,
    b_EOr: Tensor | None,
    scale: float,
    z_nr: Tensor | None,
    out_nO: Tensor,
) -> None:
    """``z = scale * A rows``, kept for backward, and ``out += B z``."""
    if a_ErI is None or b_EOr is None or z_nr is None:
        return
    rows_times(rows, a_ErI.transpose(1, 2), z_nr)
    add_rows_times(GroupRows(z_nr.mul_(scale), rows.group), b_EOr.transpose(1, 2), out_nO)


def _gradient_like(weight_E: Tensor, empty: list[int]) -> Tensor:
    """Uninitialised, except that experts without a row get exactly zero."""
    grad_E = torch.empty_like(weight_E)
    for e in empty:
        grad_E[e].zero_()
    return grad_E
