"""The CPU path as two torch operators, with shapes for tracing and a gradient: nothing breaks a graph.

Letters: T tokens, D model width, E experts, K slots a token, R routed rows, F expert width, U = 2F when
gated, else F; r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels.activations import ACTIVATIONS
from kernels.backend import ExpertTensors
from kernels.cpu.expert_autograd import BackwardPass, ExpertMLP, Kind, Weights
from kernels.plan.row_plan import RowPlan

# x, the combine weights, and all of `Weights`.
_DIFFERENTIABLE = 10


@dataclass
class _Node:
    """Holds what a forward pass saves for backward, in place of an autograd node's context."""

    plan: RowPlan
    kind: Kind
    counts: list[int] = field(default_factory=list)
    saved_tensors: tuple[Any, ...] = ()
    needs_input_grad: tuple[bool, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


def _node(
    index: Sequence[Tensor], unused: Sequence[bool], activation: str, gated: bool, scale: float
) -> _Node:
    token_R, slot_R, row_TK, counts_E = index
    has_unused, is_padded = unused
    plan = RowPlan(token_R, slot_R, row_TK, counts_E, has_unused, is_padded)
    return _Node(plan, Kind(ACTIVATIONS[activation], gated, scale, None))


def run_operators(x_TD: Tensor, weights_TK: Tensor, plan: RowPlan, experts: ExpertTensors) -> Tensor:
    """The CPU back end's ``run``, without buffers for gradients."""
    tensors = (x_TD, weights_TK, *Weights.of(experts))
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    index = [plan.token_R, plan.slot_R, plan.row_TK, plan.counts_E]
    scale = 0.0 if experts.low_rank is None else experts.low_rank.scale
    unused = [plan.has_unused, plan.is_padded]
    out: Tensor = cpu_experts(*tensors, index, unused, experts.activation, experts.gated, scale, keep)[0]
    return out


@torch.library.custom_op("graft::cpu_experts", mutates_args=())
def cpu_experts(
    x_TD: Tensor,
    weights_TK: Tensor,
    w_up_EUD: Tensor,
    w_down_EDF: Tensor,
    b_up_EU: Tensor | None,
    b_down_ED: Tensor | None,
    low_a_up_ErD: Tensor | None,
    low_b_up_EUr: Tensor | None,
    low_a_down_ErF: Tensor | None,
    low_b_down_EDr: Tensor | None,
    index: Sequence[Tensor],
    unused: Sequence[bool],
    activation: str,
    gated: bool,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``out_TD``, and what backward needs, empty unless `keep`: H and the rows between low-rank factors.

    Args:
        index: ``token_R, slot_R, row_TK, counts_E`` of a `kernels.plan.row_plan.RowPlan`.
        unused: Its ``has_unused, is_padded``.
    """
    factors = (low_a_up_ErD, low_b_up_EUr, low_a_down_ErF, low_b_down_EDr)
    node = _node(index, unused, activation, gated, scale)
    weights = (w_up_EUD, w_down_EDF, b_up_EU, b_down_ED, *factors)
    out_TD = ExpertMLP.forward(node, node.plan, node.kind, x_TD, weights_TK, *weights)
    kept = node.saved_tensors[2:5] if keep else (None,) * 3
    h_RU, z_up_Rr, z_down_Rr = (x_TD.new_empty(0) if value is None else value for value in kept)
    return out_TD, h_RU, z_up_Rr, z_down_Rr


@cpu_experts.register_fake
def _cpu_experts_shapes(x_TD: Tensor, weights_TK: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    w, (index, *_, keep) = Weights(*rest[: len(Weights._fields)]), rest[len(Weights._fields) :]
    new, R = x_TD.new_empty, index[0].shape[0]
    z_up, z_down = (
        new(R, a.shape[1]) if keep and a is not None else new(0) for a in (w.low_a_up_ErD, w.low_a_down_ErF)
    )
    return new(x_TD.shape), new(R, w.w_up_EUD.shape[1]) if keep else new(0), z_up, z_down


@torch.library.custom_op("graft::cpu_experts_backward", mutates_args=())
def cpu_experts_backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    w_up_EUD: Tensor,
    w_down_EDF: Tensor,
    b_up_EU: Tensor | None,
    b_down_ED: Tensor | None,
    low_a_up_ErD: Tensor | None,
    low_b_up_EUr: Tensor | None,
    low_a_down_ErF: Tensor | None,
    low_b_down_EDr: Tensor | None,
    kept: Sequence[Tensor],
    index: Sequence[Tensor],
    unused: Sequence[bool],
    activation: str,
    gated: bool,
    scale: float,
    need: Sequence[bool],
) -> list[Tensor]:
    """The gradients of the first ten tensors behind `grad_TD`; empty where `need` is False.

    Args:
        kept: What `cpu_experts` returned behind its output.
    """
    factors = (low_a_up_ErD, low_b_up_EUr, low_a_down_ErF, low_b_down_EDr)
    node = _node(index, unused, activation, gated, scale)
    node.counts = node.plan.counts_E.tolist()
    weights = (w_up_EUD, w_down_EDF, b_up_EU, b_down_ED, *factors)
    node.save_for_backward(x_TD, weights_TK, *kept, *weights)
    node.needs_input_grad = (False, False, *need)
    found = BackwardPass(node, grad_TD.contiguous()).run()
    return [grad_TD.new_empty(0) if value is None else value for value in found]


@cpu_experts_backward.register_fake
def _cpu_experts_backward_shapes(grad_TD: Tensor, *rest: Any) -> list[Tensor]:
    tensors, need = rest[:_DIFFERENTIABLE], rest[-1]
    return [
        grad_TD.new_empty(0) if value is None or not wanted else torch.empty_like(value)
        for value, wanted in zip(tensors, need, strict=True)
    ]


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, (index, unused, activation, gated, scale, _) = inputs[:_DIFFERENTIABLE], inputs[_DIFFERENTIABLE:]
    ctx.save_for_backward(*tensors, *output[1:], *index)
    ctx.rest = list(unused), activation, gated, scale


def _backward(ctx: Any, grad_TD: Tensor, *_: Tensor | None) -> tuple[Tensor | list[None] | None, ...]:
    saved = ctx.saved_tensors
    tensors, kept, index = saved[:_DIFFERENTIABLE], saved[_DIFFERENTIABLE:-4], saved[-4:]
    need = list(ctx.needs_input_grad[:_DIFFERENTIABLE])
    found = cpu_experts_backward(grad_TD, *tensors, list(kept), list(index), *ctx.rest, need)
    gradients = (value if wanted else None for value, wanted in zip(found, need, strict=True))
    return (*gradients, [None] * 4, *(None,) * 5)


cpu_experts.register_autograd(_backward, setup_context=_keep_for_backward)
