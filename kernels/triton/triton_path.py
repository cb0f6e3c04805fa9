"""Triton path of the experts, launch by launch: the forward pass, and the backward pass over what it keeps.

Letters: T tokens, D model width, E experts, K slots a token, R routed rows, F expert width, U = 2F when
gated, else F; r rank of low-rank factors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import ExpertTensors, LowRank
from kernels.plan.row_plan import RowPlan
from kernels.torch.expert_ops import GRADIENTS, BackwardInputs
from kernels.triton.triton_launch import (
    BiasSums,
    Gating,
    LowTerm,
    Side,
    Tiles,
    combine,
    down_backward,
    low_rows,
    make_tiles,
    on_device,
    rows_times,
    target_of,
    up,
    weight_gradient,
)


def _tiles(plan: RowPlan, x_TD: Tensor) -> Tiles:
    return make_tiles(plan.counts_E, plan.num_rows, target_of(x_TD))


def forward(
    x_TD: Tensor, weights_TK: Tensor, experts: ExpertTensors, plan: RowPlan, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes the experts; see `kernels.torch.expert_ops.experts_op`.

    Returns:
        ``out_TD``, and for backward ``h_RU`` and ``low_Rr = s A_up x``, of no rows unless `keep`; last an
        empty tensor, since ``s A_down a`` is recomputed.
    """
    low, gating = experts.low_rank, Gating(experts.activation, experts.gated)
    with on_device(x_TD):
        tiles = _tiles(plan, x_TD)
        up_term = down_term = None
        low_Rr = x_TD.new_empty(0, 0 if low is None else low.rank)
        if low is not None:
            a_EDr = low.a_up_ErD.transpose(1, 2)
            z_Rr = low_rows(Side(x_TD, True), a_EDr, low.scale, plan.token_R, tiles)
            up_term = LowTerm(z_Rr, low.b_up_EUr.transpose(1, 2))
            low_Rr = z_Rr if keep else low_Rr
        h_RU, a_RF = up(x_TD, experts.w_up_EUD, experts.b_up_EU, plan.token_R, tiles, gating, keep, up_term)
        if low is not None:
            down_term = LowTerm(_down_low(a_RF, low, plan, tiles), low.b_down_EDr.transpose(1, 2))
        y_RD = rows_times(a_RF, experts.w_down_EDF.transpose(1, 2), experts.b_down_ED, tiles, down_term)
        del a_RF
        nothing = x_TD.new_empty(0, low_Rr.shape[1])
        return combine(y_RD, weights_TK, plan.row_TK), h_RU, low_Rr, nothing


def _down_low(a_RF: Tensor, low: LowRank, plan: RowPlan, tiles: Tiles) -> Tensor:
    """Returns ``s A_down a`` of each row."""
    return low_rows(Side(a_RF, False), low.a_down_ErF.transpose(1, 2), low.scale, plan.token_R, tiles)


@dataclass(frozen=True)
class _Step:
    """A backward pass and its tiles."""

    inputs: BackwardInputs
    tiles: Tiles

    def product(
        self, left: Side, right: Side, out_EPQ: Tensor, sums: BiasSums | None = None, accumulate: bool = False
    ) -> Tensor:
        """Writes the gradient of a weight or factor over the rows of this step, and returns it."""
        weight_gradient(left, right, self.inputs.plan.token_R, self.tiles, out_EPQ, accumulate, sums)
        return out_EPQ

    def weight(
        self, name: str, left: Side, right: Side, w_EPQ: Tensor, main_EPQ: Tensor | None
    ) -> dict[str, Tensor]:
        """Returns the gradients of a weight and its bias that are needed and that no fp32 buffer takes."""
        weight, bias = f"w_{name}", f"b_{name}"
        found: dict[str, Tensor] = {}
        E, P, _ = w_EPQ.shape
        sums = None
        if self.inputs.need[bias]:
            scale = (self.inputs.weights_TK, self.inputs.plan.slot_R) if name == "down" else None
            sums = BiasSums(w_EPQ.new_empty(E, P), scale)
            found[bias] = sums.out_EP
        if not self.inputs.need[weight]:
            if sums is not None:
                # The sums need a product: one of a single column, which is dropped.
                self.product(left, Side(right.rows[:, :1], right.is_gathered), w_EPQ.new_empty(E, P, 1), sums)
        elif main_EPQ is None:
            found[weight] = self.product(left, right, w_EPQ.new_empty(w_EPQ.shape), sums)
        else:
            self.product(left, right, main_EPQ, sums, accumulate=True)
        return found


def backward(inputs: BackwardInputs) -> tuple[Tensor | None, ...]:
    """Returns the gradients in the order of `GRADIENTS`; None where not needed or buffered."""
    grad_TD, weights_TK, experts, plan = inputs.grad_TD, inputs.weights_TK, inputs.experts, inputs.plan
    low, (h_RU, low_Rr, _) = experts.low_rank, inputs.kept
    with on_device(grad_TD):
        step = _Step(inputs, _tiles(plan, inputs.x_TD))
        term = None
        if low is not None:
            u_Rr = low_rows(Side(grad_TD, True), low.b_down_EDr, low.scale, plan.token_R, step.tiles)
            term = LowTerm(u_Rr, low.a_down_ErF)
        weights = (experts.w_down_EDF, experts.b_down_ED, weights_TK)
        gating = Gating(experts.activation, experts.gated)
        dh_RU, sa_RF, dots_R = down_backward(
            grad_TD, *weights, plan.token_R, plan.slot_R, step.tiles, h_RU, gating, term
        )
        found = _down_side(step, sa_RF, term)
        del sa_RF, term
        found |= _up_side(step, dh_RU, low_Rr)
        if inputs.need["weights"]:
            found["weights"] = _of_slots(dots_R, plan.row_TK).to(weights_TK.dtype)
    return tuple(found.get(name) for name in GRADIENTS)


def _down_side(step: _Step, sa_RF: Tensor, term: LowTerm | None) -> dict[str, Tensor]:
    """Returns the gradients of the down projection; `term` is what its factors added to dA'."""
    inputs, experts = step.inputs, step.inputs.experts
    low, main = experts.low_rank, experts.main_grads
    grad, sa = Side(inputs.grad_TD, True), Side(sa_RF, False)
    found = step.weight("down", grad, sa, experts.w_down_EDF, None if main is None else main.w_down_EDF)
    if low is None or term is None:
        return found
    if inputs.need["low_a_down"]:
        da_ErF = low.a_down_ErF.new_empty(low.a_down_ErF.shape)
        step.product(sa, Side(term.low_Rr, False), da_ErF.transpose(1, 2))
        found["low_a_down"] = da_ErF
    if inputs.need["low_b_down"]:
        # Recomputed, as A is; it includes the combine weight already.
        sz_Rr = _down_low(sa_RF, low, inputs.plan, step.tiles)
        db_EDr = low.b_down_EDr.new_empty(low.b_down_EDr.shape)
        found["low_b_down"] = step.product(grad, Side(sz_Rr, False), db_EDr)
    return found


def _up_side(step: _Step, dh_RU: Tensor, low_Rr: Tensor) -> dict[str, Tensor]:
    """Returns the gradients of x and of the up projection."""
    inputs, experts = step.inputs, step.inputs.experts
    low, main = experts.low_rank, experts.main_grads
    dh, x = Side(dh_RU, False), Side(inputs.x_TD, True)
    found = step.weight("up", dh, x, experts.w_up_EUD, None if main is None else main.w_up_EUD)
    term = None
    if low is not None and (inputs.need["x"] or inputs.need["low_a_up"]):
        v_Rr = low_rows(dh, low.b_up_EUr, low.scale, inputs.plan.token_R, step.tiles)
        term = LowTerm(v_Rr, low.a_up_ErD)
        if inputs.need["low_a_up"]:
            da_ErD = low.a_up_ErD.new_empty(low.a_up_ErD.shape)
            step.product(x, Side(v_Rr, False), da_ErD.transpose(1, 2))
            found["low_a_up"] = da_ErD
    if low is not None and inputs.need["low_b_up"]:
        db_EUr = low.b_up_EUr.new_empty(low.b_up_EUr.shape)
        found["low_b_up"] = step.product(dh, Side(low_Rr, False), db_EUr)
    if inputs.need["x"]:
        dx_RD = rows_times(dh_RU, experts.w_up_EUD, None, step.tiles, term)
        found["x"] = combine(dx_RD, None, inputs.plan.row_TK)
    return found


def _of_slots(value_R: Tensor, row_TK: Tensor) -> Tensor:
    """Returns the value of each slot's row; zero where the slot is unused."""
    padded = torch.cat([value_R, value_R.new_zeros(1)])
    return padded[row_TK]
