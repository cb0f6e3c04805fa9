"""Experts on a CPU: forward and backward over rows sorted by expert, elementwise work in cache-sized groups.

Backward keeps only x and the pre-activation H, as SonicMoE does on GPUs (arXiv 2512.14080), and the
``[R, r]`` rows of low-rank factors: activations are recomputed, and the gradient of the combine weights is
``<dA', A>`` with ``dA' = dO W_down``, which needs no expert outputs Y.

Large experts are multiplied one by one (256 rows an expert reach 80% of a dense product's rate), small ones
in padded batches: see `kernels.cpu.cpu_groups`. Elementwise work runs once for a group of neighbouring
experts, which fits the cache and makes the cost of torch calls negligible.

Letters: T tokens, D model width, E experts, K slots a token, R routed rows, F expert width,
U = 2F when gated, else F; r rank; n rows of one group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from kernels.activations import ACTIVATIONS
from kernels.backend import ExpertTensors
from kernels.cpu.cpu_groups import (
    GroupRows,
    RowGroup,
    add_weight_gradient,
    row_groups,
    rows_times,
    weight_gradient,
)
from kernels.cpu.cpu_lora import LoraSide
from kernels.plan.row_plan import RowPlan
from kernels.torch.combine import combine_rows
from kernels.torch.expert_ops import GRADIENTS, BackwardInputs


def forward(
    x_TD: Tensor, weights_TK: Tensor, experts: ExpertTensors, plan: RowPlan, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes the experts; see `kernels.torch.expert_ops.experts_op`.

    Returns:
        ``out_TD``, and ``h_RU`` and the low-rank rows ``z_Rr`` of up and down; these are empty unless `keep`.
    """
    R, (_, U, F) = plan.num_rows, _widths(experts)
    sides = LoraSide.both(experts.low_rank)
    h_RU = x_TD.new_empty(R, U)
    y_RD = _rows_for_combining(x_TD, plan)
    z_Rr = [x_TD.new_empty(0, 0) if s is None else x_TD.new_empty(R, s.a_ErI.shape[1]) for s in sides]
    for group in _groups(plan, experts, buffers=1):
        rows = slice(group.start, group.stop)
        x = GroupRows(x_TD.index_select(0, plan.token_R[rows]), group)
        _project(x, experts.w_up_EUD, experts.b_up_EU, sides[0], z_Rr[0], h_RU)
        a_nF = _activate(h_RU[rows], experts, x_TD.new_empty(len(x.rows_nK), F))
        _project(GroupRows(a_nF, group), experts.w_down_EDF, experts.b_down_ED, sides[1], z_Rr[1], y_RD)
    out_TD = combine_rows(y_RD, plan, weights_TK)
    if keep:
        return out_TD, h_RU, z_Rr[0], z_Rr[1]
    z_up_Rr, z_down_Rr = (x_TD.new_empty(0, z.shape[1]) for z in z_Rr)
    return out_TD, x_TD.new_empty(0, U), z_up_Rr, z_down_Rr


def _project(
    rows: GroupRows,
    weight_EOI: Tensor,
    bias_EO: Tensor | None,
    side: LoraSide | None,
    z_Rr: Tensor,
    out_RO: Tensor,
) -> None:
    """Writes ``W x + B z + b`` for the rows of a group."""
    group = rows.group
    own = slice(group.start, group.stop)
    rows_times(rows, weight_EOI.transpose(1, 2), out_RO[own])
    if side is not None:
        side.add_to(out_RO[own], rows, z_Rr[own])
    if bias_EO is not None:
        for e, a, b in group.spans:
            out_RO[a:b] += bias_EO[e]


def backward(inputs: BackwardInputs) -> tuple[Tensor | None, ...]:
    """Returns the gradients in the order of `kernels.torch.expert_ops.GRADIENTS`; None where not needed."""
    step = _Backward(inputs)
    for group in _groups(inputs.plan, inputs.experts, buffers=2):
        step.group(group)
    return step.gradients()


class _Backward:
    """Buffers of one backward pass; `group` fills in the part of some neighbouring experts.

    Letters besides: s combine weight of a row, dO gradient of its token's output, A = act(H). For each row
    ``dA' = dO W_down``, ``ds = <dA', A>``, ``dA = s dA'``, ``dH = dA act'(H)`` and ``dx = dH W_up``; for each
    expert ``dW_down = dO^T (s A)`` and ``dW_up = dH^T x``.
    """

    def __init__(self, inputs: BackwardInputs) -> None:
        grad_TD, x_TD, weights_TK = inputs.grad_TD.contiguous(), inputs.x_TD, inputs.weights_TK
        experts, plan = inputs.experts, inputs.plan
        self.grad_TD, self.x_TD, self.weights_TK = grad_TD, x_TD, weights_TK
        self.experts, self.plan, self.need = experts, plan, inputs.need
        self.h_RU, self.z_up_Rr, self.z_down_Rr = inputs.kept
        self.up_side, self.down_side = LoraSide.both(experts.low_rank)
        self.s_R = weights_TK.reshape(-1)[plan.slot_R].to(grad_TD.dtype)
        # No expert writes the rows that pad a plan.
        new = weights_TK.new_zeros if plan.is_padded else weights_TK.new_empty
        self.ds_R = new(plan.num_rows)
        self.dx_RD = _rows_for_combining(grad_TD, plan) if self.need["x"] else None
        empty = [e for e, count in enumerate(plan.counts_E.tolist()) if count == 0]
        low = experts.low_rank
        factors = (None,) * 4 if low is None else low.factors
        tensors = (experts.w_up_EUD, experts.w_down_EDF, experts.b_up_EU, experts.b_down_ED, *factors)
        self.dw: dict[str, Tensor] = {}
        for name, weight in zip(GRADIENTS[2:], tensors, strict=True):
            is_buffered = experts.main_grads is not None and name.startswith("w_")
            if self.need[name] and not is_buffered:
                assert weight is not None, name
                self.dw[name] = _gradient_like(weight, empty)

    def group(self, group: RowGroup) -> None:
        """Fills in the gradients of a group, from the output back to the tokens."""
        rows = slice(group.start, group.stop)
        grad = GroupRows(self.grad_TD.index_select(0, self.plan.token_R[rows]), group)
        da_nF, u = self._activation_gradient(grad)
        sa, dh = self._elementwise(group, da_nF)
        self._down(grad, sa, u)
        self._up(dh)

    def _activation_gradient(self, grad: GroupRows) -> tuple[Tensor, GroupRows | None]:
        """Returns ``dA' = dO W_down``, and the low-rank ``u`` that is part of it."""
        da_nF = self.grad_TD.new_empty(len(grad.rows_nK), self.experts.width)
        rows_times(grad, self.experts.w_down_EDF, da_nF)
        if self.down_side is None:
            return da_nF, None
        u = self.down_side.output_gradient(grad)
        self.down_side.add_input_gradient(u, da_nF)
        return da_nF, u

    def _elementwise(self, group: RowGroup, da_nF: Tensor) -> tuple[GroupRows, GroupRows]:
        """Recomputes A from H, writes ``ds = <dA', A>``, and returns ``s A`` and ``dH = s dA' act'(H)``."""
        rows = slice(group.start, group.stop)
        act, h_nU, s_n1 = ACTIVATIONS[self.experts.activation], self.h_RU[rows], self.s_R[rows, None]
        dh_nU = torch.empty_like(h_nU)
        if not self.experts.gated:
            a_nF = act.forward_out(h_nU, torch.empty_like(da_nF))
            self._combine_weight_gradient(rows, da_nF, a_nF)
            act.backward_out(da_nF.mul_(s_n1), h_nU, dh_nU)
            return GroupRows(a_nF.mul_(s_n1), group), GroupRows(dh_nU, group)
        gate, value = h_nU.chunk(2, dim=1)
        dgate, dvalue = dh_nU.chunk(2, dim=1)
        fgate_nF = act.forward_out(gate, torch.empty_like(da_nF))
        fvalue_nF = act.forward(value) if act.on_value else value
        a_nF = fgate_nF * fvalue_nF
        self._combine_weight_gradient(rows, da_nF, a_nF)
        da_nF.mul_(s_n1)
        torch.mul(da_nF, fgate_nF, out=dvalue)
        if act.on_value:
            act.backward_out(dvalue, value, dvalue)
        act.backward_out(da_nF.mul_(fvalue_nF), gate, dgate)
        return GroupRows(a_nF.mul_(s_n1), group), GroupRows(dh_nU, group)

    def _combine_weight_gradient(self, rows: slice, da_nF: Tensor, a_nF: Tensor) -> None:
        """Writes ``ds = <dA', A>``, without the part of the down bias."""
        if self.need["weights"]:
            self.ds_R[rows] = torch.linalg.vecdot(da_nF, a_nF)

    def _down(self, grad: GroupRows, sa: GroupRows, u: GroupRows | None) -> None:
        """Writes ``dW_down = dO^T (s A)``, ``db_down``, ``dA_down = u^T (s A)``, ``dB_down = dO^T (s z)``."""
        group = grad.group
        if self.experts.b_down_ED is not None:
            self._down_bias(grad, self.experts.b_down_ED)
        if self.need["w_down"]:
            self._weight("w_down", grad, sa)
        if "low_a_down" in self.dw:
            assert u is not None
            weight_gradient(u, sa, self.dw["low_a_down"])
        if "low_b_down" in self.dw:
            rows = slice(group.start, group.stop)
            sz = GroupRows(self.z_down_Rr[rows] * self.s_R[rows, None], group)
            weight_gradient(grad, sz, self.dw["low_b_down"])

    def _down_bias(self, grad: GroupRows, bias_ED: Tensor) -> None:
        """Writes ``db_down = sum s dO``; the bias is part of Y, so ``<dO, b_down>`` is added to ds."""
        group = grad.group
        scaled_nD = grad.rows_nK * self.s_R[group.start : group.stop, None]
        for e, a, b in group.spans:
            if self.need["weights"]:
                self.ds_R[a:b] += grad.of(a, b) @ bias_ED[e]
            if "b_down" in self.dw:
                self.dw["b_down"][e] = scaled_nD[a - group.start : b - group.start].sum(0)

    def _up(self, dh: GroupRows) -> None:
        """Writes ``dx = dH W_up``, ``dW_up = dH^T x``, ``db_up``, ``dA_up = u^T x``, ``dB_up = dH^T z``."""
        group = dh.group
        rows = slice(group.start, group.stop)
        needs_x = self.need["w_up"] or self.need["low_a_up"]
        if self.dx_RD is not None:
            rows_times(dh, self.experts.w_up_EUD, self.dx_RD[rows])
        u = None
        if self.up_side is not None and (needs_x or self.dx_RD is not None):
            u = self.up_side.output_gradient(dh)
            if self.dx_RD is not None:
                self.up_side.add_input_gradient(u, self.dx_RD[rows])
        if needs_x:
            x = GroupRows(self.x_TD.index_select(0, self.plan.token_R[rows]), group)
            if self.need["w_up"]:
                self._weight("w_up", dh, x)
            if "low_a_up" in self.dw:
                assert u is not None
                weight_gradient(u, x, self.dw["low_a_up"])
        if "low_b_up" in self.dw:
            weight_gradient(dh, GroupRows(self.z_up_Rr[rows], group), self.dw["low_b_up"])
        if "b_up" in self.dw:
            for e, a, b in group.spans:
                self.dw["b_up"][e] = dh.of(a, b).sum(0)

    def _weight(self, name: Literal["w_up", "w_down"], left: GroupRows, right: GroupRows) -> None:
        """Writes the gradient of a stacked weight, or adds it to its fp32 buffer."""
        main = self.experts.main_grads
        if main is None:
            weight_gradient(left, right, self.dw[name])
        else:
            add_weight_gradient(left, right, main.w_up_EUD if name == "w_up" else main.w_down_EDF)

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Sums the rows of each token, and returns every gradient."""
        found: dict[str, Tensor] = dict(self.dw)
        if self.dx_RD is not None:
            found["x"] = combine_rows(self.dx_RD, self.plan, None)
        if self.need["weights"]:
            dweights_N = torch.zeros_like(self.weights_TK).view(-1)
            dweights_N[self.plan.slot_R] = self.ds_R
            found["weights"] = dweights_N.view_as(self.weights_TK)
        return tuple(found.get(name) for name in GRADIENTS)


def _widths(experts: ExpertTensors) -> tuple[int, int, int]:
    """Returns D, U and F."""
    return experts.w_up_EUD.shape[2], experts.w_up_EUD.shape[1], experts.width


def _groups(plan: RowPlan, experts: ExpertTensors, buffers: int) -> Iterator[RowGroup]:
    """Cuts the experts into groups, for a pass that holds so many buffers of ``D + U + F`` a row."""
    D, U, F = _widths(experts)
    size = experts.w_up_EUD.element_size()
    # The work of a row is the mean of the products with up and down.
    return row_groups(plan.counts_E.tolist(), buffers * (D + U + F) * size, D * (U + F) / 2, size)


def _rows_for_combining(like_TD: Tensor, plan: RowPlan) -> Tensor:
    """Returns ``[R, D]`` uninitialised, or ``[R + 1, D]`` with a last row of zeros for unused slots."""
    rows_RD = like_TD.new_empty(plan.num_rows + plan.has_unused, like_TD.shape[1])
    rows_RD[plan.num_rows :].zero_()
    return rows_RD


def _activate(h_nU: Tensor, experts: ExpertTensors, out_nF: Tensor) -> Tensor:
    act = ACTIVATIONS[experts.activation]
    if not experts.gated:
        return act.forward_out(h_nU, out_nF)
    gate, value = h_nU.chunk(2, dim=1)
    return act.forward_out(gate, out_nF).mul_(act.forward(value) if act.on_value else value)


def _gradient_like(weight_E: Tensor, empty: list[int]) -> Tensor:
    """Returns an uninitialised buffer, zero for experts without rows."""
    grad_E = weight_E.new_empty(weight_E.shape)
    for e in empty:
        grad_E[e].zero_()
    return grad_E
