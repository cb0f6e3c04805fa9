"""The Triton path as two torch operators, with shapes for tracing and a gradient: nothing breaks a graph.

Operators take flat lists: ``factors`` are the four of `kernels.backend.LowRank` in its order, or none;
``main_grads`` the two of `kernels.backend.MainGrads`, or none.

Letters: T tokens, D model width, E experts, K slots a token, R routed rows, F expert width, U = 2F when
gated, else F; r rank of low-rank factors.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels.backend import ExpertTensors, LowRank, MainGrads

#: In the order of `kernels.triton.triton_path.GRADIENTS`. No list: what writes into arguments may not return
# one.
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _path() -> ModuleType:
    # Imported when needed: Triton may be absent, and decides on import whether it compiles or interprets.
    return importlib.import_module("kernels.triton.triton_path")


def _low_rank(factors: Sequence[Tensor], scale: float) -> LowRank | None:
    if not factors:
        return None
    a_up_ErD, b_up_EUr, a_down_ErF, b_down_EDr = factors
    return LowRank(a_up_ErD, b_up_EUr, a_down_ErF, b_down_EDr, scale)


@torch.library.custom_op("graft::experts", mutates_args=())
def experts(
    x_TD: Tensor,
    weights_TK: Tensor,
    w_up_EUD: Tensor,
    w_down_EDF: Tensor,
    b_up_EU: Tensor | None,
    b_down_ED: Tensor | None,
    factors: Sequence[Tensor],
    main_grads: Sequence[Tensor],
    token_R: Tensor,
    slot_R: Tensor,
    row_TK: Tensor,
    counts_E: Tensor,
    activation: str,
    gated: bool,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``out_TD``, and what backward needs: the pre-activation ``h_RU``, and ``low_Rr``; empty unless `keep`.

    `main_grads` is for backward alone.
    """
    path = _path()
    low_rank = _low_rank(factors, scale)
    tensors = ExpertTensors(w_up_EUD, w_down_EDF, activation, gated, b_up_EU, b_down_ED, low_rank)
    rows = path.Rows(token_R, slot_R, row_TK, counts_E)
    out: tuple[Tensor, Tensor, Tensor] = path.forward(x_TD, weights_TK, tensors, rows, keep)
    return out


@experts.register_fake
def _experts_shapes(
    x_TD: Tensor,
    weights_TK: Tensor,
    w_up_EUD: Tensor,
    w_down_EDF: Tensor,
    b_up_EU: Tensor | None,
    b_down_ED: Tensor | None,
    factors: Sequence[Tensor],
    main_grads: Sequence[Tensor],
    token_R: Tensor,
    slot_R: Tensor,
    row_TK: Tensor,
    counts_E: Tensor,
    activation: str,
    gated: bool,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    R = token_R.shape[0] if keep else 0
    h_RU = x_TD.new_empty(R, w_up_EUD.shape[1])
    low_Rr = x_TD.new_empty(R, factors[0].shape[1]) if factors else x_TD.new_empty(0, 0)
    return x_TD.new_empty(x_TD.shape), h_RU, low_Rr


@torch.library.custom_op("graft::experts_backward", mutates_args=("main_grads",))
def experts_backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    w_up_EUD: Tensor,
    w_down_EDF: Tensor,
    b_down_ED: Tensor | None,
    factors: Sequence[Tensor],
    main_grads: Sequence[Tensor],
    h_RU: Tensor,
    low_Rr: Tensor,
    token_R: Tensor,
    slot_R: Tensor,
    row_TK: Tensor,
    counts_E: Tensor,
    activation: str,
    gated: bool,
    scale: float,
    need: Sequence[bool],
) -> Gradients:
    """Gradients of x, weights, w_up, w_down, b_up, b_down, factors; see `triton_path.backward`."""
    path = _path()
    tensors = ExpertTensors(
        w_up_EUD,
        w_down_EDF,
        activation,
        gated,
        b_down_ED=b_down_ED,
        low_rank=_low_rank(factors, scale),
        main_grads=MainGrads(*main_grads) if main_grads else None,
    )
    rows = path.Rows(token_R, slot_R, row_TK, counts_E)
    found: Gradients = path.backward(grad_TD, x_TD, weights_TK, tensors, rows, h_RU, low_Rr, need)
    return found


@experts_backward.register_fake
def _experts_backward_shapes(
    grad_TD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    w_up_EUD: Tensor,
    w_down_EDF: Tensor,
    b_down_ED: Tensor | None,
    factors: Sequence[Tensor],
    main_grads: Sequence[Tensor],
    h_RU: Tensor,
    low_Rr: Tensor,
    token_R: Tensor,
    slot_R: Tensor,
    row_TK: Tensor,
    counts_E: Tensor,
    activation: str,
    gated: bool,
    scale: float,
    need: Sequence[bool],
) -> Gradients:
    (E, U, _), D = w_up_EUD.shape, w_down_EDF.shape[1]
    returns_weights = not main_grads
    shapes = (
        (x_TD, x_TD.shape, need[0]),
        (weights_TK, weights_TK.shape, need[1]),
        (w_up_EUD, w_up_EUD.shape, need[2] and returns_weights),
        (w_down_EDF, w_down_EDF.shape, need[3] and returns_weights),
        (w_up_EUD, (E, U), need[4]),
        (w_down_EDF, (E, D), need[5]),
        *((factor, factor.shape, wanted) for factor, wanted in zip(factors, need[6:], strict=False)),
    )
    found = [like.new_empty(shape) if wanted else x_TD.new_empty(0) for like, shape, wanted in shapes]
    return (*found, *(x_TD.new_empty(0) for _ in range(len(need) - len(found))))  # type: ignore[return-value]


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weights, w_up, w_down, _, b_down, factors, main_grads, *index, activation, gated, scale, _ = inputs
    ctx.save_for_backward(x, weights, w_up, w_down, b_down, *output[1:], *index, *factors)
    # Not saved: others may add to the buffers before this backward does, which is no mistake.
    ctx.main_grads = main_grads
    ctx.function = (activation, gated, scale)


def _backward(ctx: Any, grad_TD: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    x, weights, w_up, w_down, b_down, h, low, token, slot, row, counts, *factors = ctx.saved_tensors
    leaves, low_needed = ctx.needs_input_grad[:6], ctx.needs_input_grad[6]
    need = [*leaves, *(low_needed or (False,) * 4)]
    found = experts_backward(
        *(grad_TD, x, weights, w_up, w_down, b_down, factors, ctx.main_grads, h, low),
        *(token, slot, row, counts, *ctx.function, need),
    )
    returned = [wanted and not (ctx.main_grads and i in (2, 3)) for i, wanted in enumerate(need)]
    grads = [value if wanted else None for value, wanted in zip(found, returned, strict=True)]
    none = [None for _ in ctx.main_grads]
    return (*grads[:6], grads[6:] if factors else [], none, *(None,) * 8)


experts.register_autograd(_backward, setup_context=_keep_for_backward)
