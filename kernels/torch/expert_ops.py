"""Torch operators of the expert computation: ``graft::experts`` and its backward, traceable by the compiler.

The operators take flat lists: ``factors`` holds the four tensors of `kernels.backend.LowRank` or none,
``main_grads`` the two of `kernels.backend.MainGrads` or none, ``index`` the tensors of a
`kernels.plan.row_plan.RowPlan` (token_R, slot_R, row_TK, counts_E) and ``flags`` its has_unused, is_padded.
``path`` is a key of `_PATHS`; its module defines `forward` and `backward`.

Letters: T tokens, D model width, E experts, K slots a token, R routed rows, F expert width, U = 2F when
gated, else F; r rank of low-rank factors.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels.backend import ExpertTensors, LowRank, MainGrads
from kernels.plan.row_plan import RowPlan

#: Tensors that may carry a gradient, in the order in which both paths return gradients.
GRADIENTS = (
    *("x", "weights", "w_up", "w_down", "b_up", "b_down"),
    *("low_a_up", "low_b_up", "low_a_down", "low_b_down"),
)


@dataclass(frozen=True)
class BackwardInputs:
    """Arguments of the backward pass of a path.

    Attributes:
        grad_TD: Gradient of the output, of any strides.
        x_TD: As in forward, like the next three.
        weights_TK: Combine weights.
        experts: Stacked weights; fp32 buffers take the gradients of both weights.
        plan: Routed rows in expert order.
        kept: The tensors that forward returned after its output.
        need: Whether a gradient is needed, by name in `GRADIENTS`.
    """

    grad_TD: Tensor
    x_TD: Tensor
    weights_TK: Tensor
    experts: ExpertTensors
    plan: RowPlan
    kept: Sequence[Tensor]
    need: Mapping[str, bool]


# A fixed tuple: an operator that mutates its arguments may not return a list.
_Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
# Imported when used: Triton may be missing, and chooses between compiler and interpreter when imported.
_PATHS = {"cpu": "kernels.cpu.cpu_path", "triton": "kernels.triton.triton_path"}


def run_operators(
    path: str, x_TD: Tensor, weights_TK: Tensor, plan: RowPlan, experts: ExpertTensors
) -> Tensor:
    """Runs a back end through its operators; see `kernels.backend.Backend.run`.

    Args:
        path: ``cpu`` or ``triton``.
        x_TD: ``[T, D]``.
        weights_TK: ``[T, K]`` combine weights.
        plan: Routed rows in expert order.
        experts: Stacked weights.
    """
    low, main = experts.low_rank, experts.main_grads
    biases = (experts.b_up_EU, experts.b_down_ED)
    tensors = (x_TD, weights_TK, experts.w_up_EUD, experts.w_down_EDF, *biases)
    factors = [] if low is None else list(low.factors)
    main_grads = [] if main is None else [main.w_up_EUD, main.w_down_EDF]
    leaves = [tensor for tensor in (*tensors, *factors) if tensor is not None]
    keep = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)
    index = [plan.token_R, plan.slot_R, plan.row_TK.contiguous(), plan.counts_E]
    flags = [plan.has_unused, plan.is_padded]
    function = (experts.activation, experts.gated, 0.0 if low is None else low.scale)
    out: Tensor = experts_op(*tensors, factors, main_grads, index, flags, *function, path, keep)[0]
    return out


@torch.library.custom_op("graft::experts", mutates_args=())
def experts_op(
    x_TD: Tensor,
    weights_TK: Tensor,
    w_up_EUD: Tensor,
    w_down_EDF: Tensor,
    b_up_EU: Tensor | None,
    b_down_ED: Tensor | None,
    factors: Sequence[Tensor],
    main_grads: Sequence[Tensor],
    index: Sequence[Tensor],
    flags: Sequence[bool],
    activation: str,
    gated: bool,
    scale: float,
    path: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns ``out_TD`` and what backward needs, which is empty unless `keep`.

    The latter are the pre-activation ``h_RU`` and the rows ``[R, r]`` between the low-rank factors of up and
    of down; the Triton path recomputes those of down. `main_grads` is used in backward only.
    """
    experts = _experts((w_up_EUD, w_down_EDF, b_up_EU, b_down_ED), factors, (), activation, gated, scale)
    plan = _plan(index, flags)
    out: tuple[Tensor, Tensor, Tensor, Tensor] = _module(path).forward(x_TD, weights_TK, experts, plan, keep)
    return out


@experts_op.register_fake
def _experts_shapes(x_TD: Tensor, weights_TK: Tensor, w_up_EUD: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _, _, _, factors, _, index, _, _, _, _, path, keep = rest
    R, new = index[0].shape[0] if keep else 0, x_TD.new_empty
    rank = factors[0].shape[1] if factors else 0
    rows = R if factors else 0
    low_down = new(rows if path == "cpu" else 0, rank)
    return new(x_TD.shape), new(R, w_up_EUD.shape[1]), new(rows, rank), low_down


@torch.library.custom_op("graft::experts_backward", mutates_args=("main_grads",))
def experts_backward_op(
    grad_TD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    w_up_EUD: Tensor,
    w_down_EDF: Tensor,
    b_up_EU: Tensor | None,
    b_down_ED: Tensor | None,
    factors: Sequence[Tensor],
    main_grads: Sequence[Tensor],
    kept: Sequence[Tensor],
    index: Sequence[Tensor],
    flags: Sequence[bool],
    activation: str,
    gated: bool,
    scale: float,
    path: str,
    need: Sequence[bool],
) -> _Gradients:
    """Returns the gradients in the order of `GRADIENTS`, empty where `need` is False or a buffer takes them.

    `kept` is what `experts_op` returned after its output.
    """
    weights = (w_up_EUD, w_down_EDF, b_up_EU, b_down_ED)
    experts = _experts(weights, factors, main_grads, activation, gated, scale)
    names = dict(zip(GRADIENTS, need, strict=True))
    plan = _plan(index, flags)
    inputs = BackwardInputs(grad_TD, x_TD, weights_TK, experts, plan, kept, names)
    found = _module(path).backward(inputs)
    gradients: Any = tuple(x_TD.new_empty(0) if value is None else value for value in found)
    return gradients  # type: ignore[no-any-return]


@experts_backward_op.register_fake
def _experts_backward_shapes(grad_TD: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    tensors, (factors, main_grads), need = rest[:6], rest[6:8], rest[-1]
    inputs = [*tensors, *(factors or (None,) * 4)]
    return tuple(
        torch.empty_like(value, memory_format=torch.contiguous_format) if wanted else grad_TD.new_empty(0)
        for value, wanted in zip(inputs, _returned(need, main_grads), strict=True)
    )


def _returned(need: Sequence[bool], main_grads: Sequence[Tensor]) -> list[bool]:
    """Returns which gradients autograd gets: those of weights with fp32 buffers are not among them."""
    return [wanted and not (main_grads and i in (2, 3)) for i, wanted in enumerate(need)]


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, factors, main_grads, index, flags, activation, gated, scale, path, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:], *index, *factors)
    # Not saved: other micro-batches may rightly add to the buffers before this backward pass does.
    ctx.main_grads = main_grads
    ctx.function = list(flags), activation, gated, scale, path


def _backward(ctx: Any, grad_TD: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    tensors, kept, index, factors = saved[:6], list(saved[6:9]), list(saved[9:13]), list(saved[13:])
    need = [*ctx.needs_input_grad[:6], *(ctx.needs_input_grad[6] or (False,) * 4)]
    found = experts_backward_op(grad_TD, *tensors, factors, ctx.main_grads, kept, index, *ctx.function, need)
    returned = _returned(need, ctx.main_grads)
    grads = [value if wanted else None for value, wanted in zip(found, returned, strict=True)]
    lists = (grads[6:] if factors else [], [None for _ in ctx.main_grads], [None for _ in index])
    return (*grads[:6], *lists, *(None,) * 6)


experts_op.register_autograd(_backward, setup_context=_keep_for_backward)


def _module(path: str) -> ModuleType:
    return importlib.import_module(_PATHS[path])


def _plan(index: Sequence[Tensor], flags: Sequence[bool]) -> RowPlan:
    (token_R, slot_R, row_TK, counts_E), (has_unused, is_padded) = index, flags
    return RowPlan(token_R, slot_R, row_TK, counts_E, has_unused, is_padded)


def _experts(
    weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    factors: Sequence[Tensor],
    main_grads: Sequence[Tensor],
    activation: str,
    gated: bool,
    scale: float,
) -> ExpertTensors:
    w_up_EUD, w_down_EDF, b_up_EU, b_down_ED = weights
    low_rank = LowRank.of(factors, scale) if factors else None
    main = MainGrads(*main_grads) if main_grads else None
    return ExpertTensors(w_up_EUD, w_down_EDF, activation, gated, b_up_EU, b_down_ED, low_rank, main)
