"""Experts on a CPU: one autograd node, rows sorted by expert, elementwise work in cache-sized groups.

What it saves for backward is x and the pre-activation H alone, as SonicMoE does on GPUs
(arXiv 2512.14080); the activation is recomputed, and the gradient of the combine weights is
``<dA', A>`` with ``dA' = dO W_down``, so that the expert outputs Y are never kept.

Matrix products run expert by expert (at 256 rows an expert they reach 80% of a dense product's rate);
everything elementwise runs once for a group of neighbouring experts, small enough to stay in cache and
large enough that the cost of a torch call vanishes.

Letters: T tokens, D model width, E experts, K slots a token, R routed rows, F expert width,
U = 2F when gated, else F; n rows of one group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.activations import ACTIVATIONS, Activation
from kernels.backend import ExpertTensors, Workload
from kernels.combine import combine_rows
from kernels.plan import RowPlan

# A group's buffers together should fit into the second-level cache and its share of the third.
_GROUP_BYTES = 2 * 2**20


@dataclass(frozen=True)
class _Group:
    """Neighbouring experts that are handled together: rows [start, stop) and who owns which of them."""

    start: int
    stop: int
    spans: tuple[tuple[int, int, int], ...]  # (expert, first row, last row + 1)


def _groups(counts: list[int], row_bytes: int) -> Iterator[_Group]:
    limit = max(1, _GROUP_BYTES // row_bytes)
    start = row = 0
    spans: list[tuple[int, int, int]] = []
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        if spans and row + count - start > limit:
            yield _Group(start, row, tuple(spans))
            start, spans = row, []
        spans.append((expert, row, row + count))
        row += count
    if spans:
        yield _Group(start, row, tuple(spans))


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
        for group in _groups(counts, (D + U + F) * x_TD.element_size()):
            x_nD = x_TD.index_select(0, plan.token_R[group.start : group.stop])
            for e, a, b in group.spans:
                _product(x_nD[a - group.start : b - group.start], w_up_EUD[e].t(), h_RU[a:b])
                if b_up_EU is not None:
                    h_RU[a:b] += b_up_EU[e]
            a_nF = _activate(h_RU[group.start : group.stop], act, gated, x_nD.new_empty(len(x_nD), F))
            for e, a, b in group.spans:
                _product(a_nF[a - group.start : b - group.start], w_down_EDF[e].t(), y_RD[a:b])
                if b_down_ED is not None:
                    y_RD[a:b] += b_down_ED[e]
        ctx.save_for_backward(x_TD, weights_TK, w_up_EUD, w_down_EDF, b_down_ED, h_RU)
        ctx.plan, ctx.counts, ctx.act, ctx.gated = plan, counts, act, gated
        ctx.has_b_up = b_up_EU is not None
        return combine_rows(y_RD, plan, weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        state = _Backward(ctx, grad_TD.contiguous())
        for group in _groups(ctx.counts, (2 * state.D + 2 * state.U + 2 * state.F) * grad_TD.element_size()):
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

    def group(self, group: _Group) -> None:
        rows = slice(group.start, group.stop)
        token_n = self.plan.token_R[rows]
        grad_nD = self.grad_TD.index_select(0, token_n)
        da_nF = grad_nD.new_empty(len(token_n), self.F)
        for e, a, b in group.spans:
            local = slice(a - group.start, b - group.start)
            _product(grad_nD[local], self.w_down[e], da_nF[local])
        sa_nF, dh_nU = self._elementwise(rows, da_nF)
        if self.b_down is not None:
            self._down_bias(group, grad_nD)
        self._products(group, token_n, grad_nD, sa_nF, dh_nU)

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

    def _down_bias(self, group: _Group, grad_nD: Tensor) -> None:
        """The bias of the down projection is part of Y: it enters both gradients on its own."""
        scaled_nD = grad_nD * self.scale_R[group.start : group.stop, None]
        for e, a, b in group.spans:
            local = slice(a - group.start, b - group.start)
            if self.need[1]:
                self.dscale_R[a:b] += grad_nD[local] @ self.b_down[e]
            if self.db_down is not None:
                self.db_down[e] = scaled_nD[local].sum(0)

    def _products(
        self, group: _Group, token_n: Tensor, grad_nD: Tensor, sa_nF: Tensor, dh_nU: Tensor
    ) -> None:
        x_nD = self.x_TD.index_select(0, token_n) if self.dw_up is not None else None
        for e, a, b in group.spans:
            local = slice(a - group.start, b - group.start)
            if self.dw_down is not None:
                _product(grad_nD[local].t(), sa_nF[local], self.dw_down[e])
            if self.dw_up is not None and x_nD is not None:
                _product(dh_nU[local].t(), x_nD[local], self.dw_up[e])
            if self.db_up is not None:
                self.db_up[e] = dh_nU[local].sum(0)
            if self.dx_RD is not None:
                _product(dh_nU[local], self.w_up[e], self.dx_RD[a:b])

    def gradients(self) -> tuple[Tensor | None, ...]:
        dx_TD = None if self.dx_RD is None else combine_rows(self.dx_RD, self.plan, None)
        dweights = None
        if self.need[1]:
            dweights = torch.zeros_like(self.weights_TK).view(-1)
            dweights[self.plan.slot_R] = self.dscale_R
            dweights = dweights.view_as(self.weights_TK)
        return dx_TD, dweights, self.dw_up, self.dw_down, self.db_up, self.db_down


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.mm(a, b, out=out)


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
