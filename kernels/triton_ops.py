"""The Triton path as two torch operators, with shapes for tracing and a gradient: nothing breaks a graph.

Letters: T tokens, D model width, E experts, K slots a token, R routed rows, F expert width, U = 2F when
gated, else F.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def _launcher() -> ModuleType:
    # Imported when needed: Triton may be absent, and decides on import whether it compiles or interprets.
    return importlib.import_module("kernels.triton_launch")


@torch.library.custom_op("graft::experts", mutates_args=())
def experts(
    x_TD: Tensor,
    weights_TK: Tensor,
    w_up_EUD: Tensor,
    w_down_EDF: Tensor,
    b_up_EU: Tensor | None,
    b_down_ED: Tensor | None,
    token_R: Tensor,
    slot_R: Tensor,
    row_TK: Tensor,
    counts_E: Tensor,
    activation: str,
    gated: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """``out_TD``, and the pre-activation ``h_RU`` that backward needs (of no rows unless `keep`)."""
    launch = _launcher()
    with launch.on_device(x_TD):
        tiles = launch.make_tiles(counts_E, token_R.shape[0], launch.target_of(x_TD))
        h_RU, a_RF = launch.up(x_TD, w_up_EUD, b_up_EU, token_R, tiles, activation, gated, keep)
        y_RD = launch.rows_times(a_RF, w_down_EDF.transpose(1, 2), b_down_ED, tiles)
        del a_RF
        return launch.combine(y_RD, weights_TK, row_TK), h_RU


@experts.register_fake
def _experts_shapes(
    x_TD: Tensor,
    weights_TK: Tensor,
    w_up_EUD: Tensor,
    w_down_EDF: Tensor,
    b_up_EU: Tensor | None,
    b_down_ED: Tensor | None,
    token_R: Tensor,
    slot_R: Tensor,
    row_TK: Tensor,
    counts_E: Tensor,
    activation: str,
    gated: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    h_RU = x_TD.new_empty(token_R.shape[0] if keep else 0, w_up_EUD.shape[1])
    return x_TD.new_empty(x_TD.shape), h_RU


@torch.library.custom_op("graft::experts_backward", mutates_args=())
def experts_backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    w_up_EUD: Tensor,
    w_down_EDF: Tensor,
    b_down_ED: Tensor | None,
    h_RU: Tensor,
    token_R: Tensor,
    slot_R: Tensor,
    row_TK: Tensor,
    counts_E: Tensor,
    activation: str,
    gated: bool,
    need: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, w_up, w_down, b_up, b_down; empty where `need` is False."""
    launch = _launcher()
    dx, dweights, dw_up, dw_down, db_up, db_down = (x_TD.new_empty(0) for _ in range(6))
    with launch.on_device(x_TD):
        tiles = launch.make_tiles(counts_E, token_R.shape[0], launch.target_of(x_TD))
        dh_RU, sa_RF, dots_R = launch.down_backward(
            grad_TD, w_down_EDF, b_down_ED, weights_TK, token_R, slot_R, tiles, h_RU, activation, gated
        )
        grad, x = launch.Side(grad_TD, True), launch.Side(x_TD, True)
        if need[1]:
            dweights = _of_slots(dots_R, row_TK).to(weights_TK.dtype)
        if need[3] or need[5]:
            right = launch.Side(sa_RF, False)
            scale = (weights_TK, slot_R)
            dw_down, db_down = launch.weight_gradient(
                grad, right, token_R, tiles, w_down_EDF, scale, with_bias=need[5]
            )
        del sa_RF
        if need[2] or need[4]:
            left = launch.Side(dh_RU, False)
            dw_up, db_up = launch.weight_gradient(left, x, token_R, tiles, w_up_EUD, with_bias=need[4])
        if need[0]:
            dx = launch.combine(launch.rows_times(dh_RU, w_up_EUD, None, tiles), None, row_TK)
    return dx, dweights, dw_up, dw_down, db_up, db_down


def _of_slots(value_R: Tensor, row_TK: Tensor) -> Tensor:
    """The value of each slot's row; zero where the slot is unused."""
    padded = torch.cat([value_R, value_R.new_zeros(1)])
    return padded[row_TK]


@experts_backward.register_fake
def _experts_backward_shapes(
    grad_TD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    w_up_EUD: Tensor,
    w_down_EDF: Tensor,
    b_down_ED: Tensor | None,
    h_RU: Tensor,
    token_R: Tensor,
    slot_R: Tensor,
    row_TK: Tensor,
    counts_E: Tensor,
    activation: str,
    gated: bool,
    need: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    E, U, D = w_up_EUD.shape
    none = x_TD.new_empty
    return (
        x_TD.new_empty(x_TD.shape) if need[0] else none(0),
        weights_TK.new_empty(weights_TK.shape) if need[1] else none(0),
        w_up_EUD.new_empty(E, U, D) if need[2] or need[4] else none(0),
        w_down_EDF.new_empty(E, D, w_down_EDF.shape[2]) if need[3] or need[5] else none(0),
        w_up_EUD.new_empty(E if need[4] else 0, U) if need[2] or need[4] else none(0),
        w_down_EDF.new_empty(E if need[5] else 0, D) if need[3] or need[5] else none(0),
    )


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weights, w_up, w_down, _, b_down, token, slot, row, counts, activation, gated, _ = inputs
    ctx.save_for_backward(x, weights, w_up, w_down, b_down, output[1], token, slot, row, counts)
    ctx.activation, ctx.gated = activation, gated


def _backward(ctx: Any, grad_TD: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    need = list(ctx.needs_input_grad[:6])
    found = experts_backward(grad_TD, *ctx.saved_tensors, ctx.activation, ctx.gated, need)
    gradients = (value if wanted else None for value, wanted in zip(found, need, strict=True))
    return (*gradients, *(None,) * 7)


experts.register_autograd(_backward, setup_context=_keep_for_backward)
