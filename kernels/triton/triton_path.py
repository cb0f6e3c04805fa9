"""The Triton path from launch to launch: what forward keeps, and what backward makes of it.

Letters: T tokens, D model width, E experts, K slots a token, R routed rows, F expert width, U = 2F when
gated, else F; r rank of low-rank factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import ExpertTensors, LowRank
from kernels.triton.triton_launch import (
    Gating,
    LowTerm,
    Side,
    Tiles,
    combine,
    low_rows,
    make_tiles,
    on_device,
    rows_times,
    target_of,
    up,
)
from kernels.triton.triton_launch_backward import BiasSums, down_backward, weight_gradient


@dataclass(frozen=True)
class Rows:
    """The index tensors of a `kernels.plan.row_plan.RowPlan`.

    Attributes:
        token_R: The token of each row.
        slot_R: The flat slot of each row.
        row_TK: The row of each slot, R where there is none.
        counts_E: Rows of each expert.
    """

    token_R: Tensor
    slot_R: Tensor
    row_TK: Tensor
    counts_E: Tensor

    def tiles(self, x_TD: Tensor) -> Tiles:
        """Cut for the device and the dtype of x."""
        return make_tiles(self.counts_E, self.token_R.shape[0], target_of(x_TD))


def forward(
    x_TD: Tensor, weights_TK: Tensor, experts: ExpertTensors, rows: Rows, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``out_TD``, and for backward ``h_RU`` and ``low_Rr = s A_up x``; of no rows unless `keep`."""
    low, gating = experts.low_rank, Gating(experts.activation, experts.gated)
    with on_device(x_TD):
        tiles = rows.tiles(x_TD)
        up_term = down_term = None
        low_Rr = x_TD.new_empty(0, 0 if low is None else low.rank)
        if low is not None:
            a_EDr = low.a_up_ErD.transpose(1, 2)
            z_Rr = low_rows(Side(x_TD, True), a_EDr, low.scale, rows.token_R, tiles)
            up_term = LowTerm(z_Rr, low.b_up_EUr.transpose(1, 2))
            low_Rr = z_Rr if keep else low_Rr
        h_RU, a_RF = up(x_TD, experts.w_up_EUD, experts.b_up_EU, rows.token_R, tiles, gating, keep, up_term)
        if low is not None:
            down_term = LowTerm(_down_low(a_RF, low, rows, tiles), low.b_down_EDr.transpose(1, 2))
        y_RD = rows_times(a_RF, experts.w_down_EDF.transpose(1, 2), experts.b_down_ED, tiles, down_term)
        del a_RF
        return combine(y_RD, weights_TK, rows.row_TK), h_RU, low_Rr


def _down_low(a_RF: Tensor, low: LowRank, rows: Rows, tiles: Tiles) -> Tensor:
    """``s A_down a`` of each row."""
    return low_rows(Side(a_RF, False), low.a_down_ErF.transpose(1, 2), low.scale, rows.token_R, tiles)


#: What has a gradient, in the order of `backward`; the last four are the low-rank factors.
GRADIENTS = (
    *("x", "weights", "w_up", "w_down", "b_up", "b_down"),
    *("low_a_up", "low_b_up", "low_a_down", "low_b_down"),
)


@dataclass(frozen=True)
class _Step:
    """What the parts of backward share."""

    grad_TD: Tensor
    x_TD: Tensor
    weights_TK: Tensor
    experts: ExpertTensors
    rows: Rows
    tiles: Tiles
    need: Mapping[str, bool]

    def product(
        self, left: Side, right: Side, out_EPQ: Tensor, sums: BiasSums | None = None, accumulate: bool = False
    ) -> Tensor:
        """`weight_gradient` over the rows of this step; returns what was written."""
        weight_gradient(left, right, self.rows.token_R, self.tiles, out_EPQ, accumulate, sums)
        return out_EPQ

    def weight(
        self, name: str, left: Side, right: Side, w_EPQ: Tensor, main_EPQ: Tensor | None
    ) -> dict[str, Tensor]:
        """The gradients of a weight and its bias as far as they are needed, and not added to fp32 buffers."""
        weight, bias = f"w_{name}", f"b_{name}"
        found: dict[str, Tensor] = {}
        E, P, _ = w_EPQ.shape
        sums = None
        if self.need[bias]:
            scale = (self.weights_TK, self.rows.slot_R) if name == "down" else None
            sums = BiasSums(w_EPQ.new_empty(E, P), scale)
            found[bias] = sums.out_EP
        if not self.need[weight]:
            if sums is not None:
                # The sums come with a product: of one column, which is dropped.
                self.product(left, Side(right.rows[:, :1], right.is_gathered), w_EPQ.new_empty(E, P, 1), sums)
        elif main_EPQ is None:
            found[weight] = self.product(left, right, w_EPQ.new_empty(w_EPQ.shape), sums)
        else:
            self.product(left, right, main_EPQ, sums, accumulate=True)
        return found


def backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    experts: ExpertTensors,
    rows: Rows,
    h_RU: Tensor,
    low_Rr: Tensor,
    need: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradients in the order of `GRADIENTS`.

    Args:
        grad_TD: From above.
        x_TD: As in `forward`.
        weights_TK: As in `forward`.
        experts: As in `forward`; the up bias is not looked at.
        rows: As in `forward`.
        h_RU: From `forward`.
        low_Rr: From `forward`.
        need: Which are wanted. The others are empty, and so is that of a weight with an fp32 buffer.
    """
    low = experts.low_rank
    with on_device(x_TD):
        tiles = rows.tiles(x_TD)
        step = _Step(grad_TD, x_TD, weights_TK, experts, rows, tiles, dict(zip(GRADIENTS, need, strict=True)))
        term = None
        if low is not None:
            u_Rr = low_rows(Side(grad_TD, True), low.b_down_EDr, low.scale, rows.token_R, tiles)
            term = LowTerm(u_Rr, low.a_down_ErF)
        dh_RU, sa_RF, dots_R = down_backward(
            grad_TD,
            experts.w_down_EDF,
            experts.b_down_ED,
            weights_TK,
            rows.token_R,
            rows.slot_R,
            tiles,
            h_RU,
            Gating(experts.activation, experts.gated),
            term,
        )
        found = _down_side(step, sa_RF, term)
        del sa_RF, term
        found |= _up_side(step, dh_RU, low_Rr)
        if step.need["weights"]:
            found["weights"] = _of_slots(dots_R, rows.row_TK).to(weights_TK.dtype)
    return tuple(found[name] if name in found else x_TD.new_empty(0) for name in GRADIENTS)


def _down_side(step: _Step, sa_RF: Tensor, term: LowTerm | None) -> dict[str, Tensor]:
    """Of the down projection: weight, bias and factors. `term` is what the factors added to dA'."""
    experts, low, main = step.experts, step.experts.low_rank, step.experts.main_grads
    grad, sa = Side(step.grad_TD, True), Side(sa_RF, False)
    found = step.weight("down", grad, sa, experts.w_down_EDF, None if main is None else main.w_down_EDF)
    if low is None or term is None:
        return found
    if step.need["low_a_down"]:
        da_ErF = low.a_down_ErF.new_empty(low.a_down_ErF.shape)
        step.product(sa, Side(term.low_Rr, False), da_ErF.transpose(1, 2))
        found["low_a_down"] = da_ErF
    if step.need["low_b_down"]:
        # Made again, as A itself is: the combine weight is in it already.
        sz_Rr = _down_low(sa_RF, low, step.rows, step.tiles)
        db_EDr = low.b_down_EDr.new_empty(low.b_down_EDr.shape)
        found["low_b_down"] = step.product(grad, Side(sz_Rr, False), db_EDr)
    return found


def _up_side(step: _Step, dh_RU: Tensor, low_Rr: Tensor) -> dict[str, Tensor]:
    """Of x, and of the up projection: weight, bias and factors."""
    experts, low, main = step.experts, step.experts.low_rank, step.experts.main_grads
    dh, x = Side(dh_RU, False), Side(step.x_TD, True)
    found = step.weight("up", dh, x, experts.w_up_EUD, None if main is None else main.w_up_EUD)
    term = None
    if low is not None and (step.need["x"] or step.need["low_a_up"]):
        v_Rr = low_rows(dh, low.b_up_EUr, low.scale, step.rows.token_R, step.tiles)
        term = LowTerm(v_Rr, low.a_up_ErD)
        if step.need["low_a_up"]:
            da_ErD = low.a_up_ErD.new_empty(low.a_up_ErD.shape)
            step.product(x, Side(v_Rr, False), da_ErD.transpose(1, 2))
            found["low_a_up"] = da_ErD
    if low is not None and step.need["low_b_up"]:
        db_EUr = low.b_up_EUr.new_empty(low.b_up_EUr.shape)
        found["low_b_up"] = step.product(dh, Side(low_Rr, False), db_EUr)
    if step.need["x"]:
        dx_RD = rows_times(dh_RU, experts.w_up_EUD, None, step.tiles, term)
        found["x"] = combine(dx_RD, None, step.rows.row_TK)
    return found


def _of_slots(value_R: Tensor, row_TK: Tensor) -> Tensor:
    """The value of each slot's row; zero where the slot is unused."""
    padded = torch.cat([value_R, value_R.new_zeros(1)])
    return padded[row_TK]
