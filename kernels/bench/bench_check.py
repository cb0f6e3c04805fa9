"""Checks a back end against fp64 before it is timed; one that is wrong is not timed.

Letters: T tokens, D model width, E experts, K slots a token, F expert width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.bench.bench_case import Layer
from kernels.expert_mlp import BACKENDS, expert_mlp

# Enough tokens to meet most experts, few enough for fp64.
_CHECKED_TOKENS = 128
_ROUNDING_STEPS = 10


@dataclass(frozen=True)
class _Expert:
    """Contribution of one expert, in fp64.

    Attributes:
        index: Index of the expert.
        token_N: Its tokens.
        slot_N: The slot in which each token has it.
        out_ND: Weighted outputs.
        grads: Gradients of the tokens, their weights, and both matrices.
    """

    index: int
    token_N: Tensor
    slot_N: Tensor
    out_ND: Tensor
    grads: tuple[Tensor, ...]


def checked_error(layer: Layer, name: str, *, backward: bool) -> float:
    """Returns the relative error of the output on the first tokens.

    Args:
        layer: Tensors of the case.
        name: A key of `kernels.expert_mlp.BACKENDS`.
        backward: Whether gradients are checked as well.

    Raises:
        RuntimeError: This error, or that of a gradient, exceeds ten rounding steps.
    """
    few = layer.first(min(_CHECKED_TOKENS, layer.case.tokens))
    with torch.set_grad_enabled(backward):
        out_TD = expert_mlp(few.x_TD, few.weights_TK, few.plan(few.case.tokens), few.experts, BACKENDS[name])
    grads = torch.autograd.grad(out_TD, few.leaves, few.grad_TD) if backward else ()
    errors = _errors(few, out_TD.detach(), grads)
    bound = _ROUNDING_STEPS * torch.finfo(layer.case.dtype).eps
    for what, error in errors.items():
        if not error <= bound:
            raise RuntimeError(f"its {what} is wrong: relative error {error:.1e}")
    return errors["output"]


def _errors(layer: Layer, out_TD: Tensor, grads: tuple[Tensor, ...]) -> dict[str, float]:
    """Returns relative errors in the L2 norm by name, with one expert in fp64 at a time to save memory."""
    expected = [torch.zeros(out_TD.shape, dtype=torch.float64, device=out_TD.device) for _ in range(2)]
    dweights_TK = torch.zeros(layer.weights_TK.shape, dtype=torch.float64, device=out_TD.device)
    # Sums of squares of difference and reference for both matrices.
    wrong, whole = [0.0, 0.0], [0.0, 0.0]
    seen = []
    for expert in _each_expert(layer, with_grads=bool(grads)):
        seen.append(expert.index)
        expected[0].index_add_(0, expert.token_N, expert.out_ND)
        if not grads:
            continue
        expected[1].index_add_(0, expert.token_N, expert.grads[0])
        dweights_TK[expert.token_N, expert.slot_N] = expert.grads[1]
        for i, grad in enumerate(expert.grads[2:]):
            wrong[i] += float((grads[2 + i][expert.index].double() - grad).square().sum())
            whole[i] += float(grad.square().sum())
    found = {"output": _relative(out_TD, expected[0])}
    if grads:
        for e in sorted(set(range(layer.case.shape.experts)) - set(seen)):
            wrong = [w + float(grads[2 + i][e].double().square().sum()) for i, w in enumerate(wrong)]
        found["gradient of x"] = _relative(grads[0], expected[1])
        found["gradient of the combine weights"] = _relative(grads[1], dweights_TK)
        names = ("gradient of w_up", "gradient of w_down")
        found |= {name: math.sqrt(w / n) for name, w, n in zip(names, wrong, whole, strict=True)}
    return found


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def _each_expert(layer: Layer, *, with_grads: bool) -> Iterator[_Expert]:
    for e in layer.ids_TK.unique().tolist():
        token_N, slot_N = (layer.ids_TK == e).nonzero(as_tuple=True)
        leaves = [
            layer.x_TD[token_N],
            layer.weights_TK[token_N, slot_N],
            layer.experts.w_up_EUD[e],
            layer.experts.w_down_EDF[e],
        ]
        x_ND, weight_N, up_UD, down_DF = (v.detach().double().requires_grad_(with_grads) for v in leaves)
        gate, value = (x_ND @ up_UD.t()).chunk(2, dim=1)
        out_ND = weight_N[:, None] * ((F.silu(gate) * value) @ down_DF.t())
        grads: tuple[Tensor, ...] = ()
        if with_grads:
            above_ND = layer.grad_TD[token_N].double()
            grads = torch.autograd.grad(out_ND, (x_ND, weight_N, up_UD, down_DF), above_ND)
        yield _Expert(e, token_N, slot_N, out_ND.detach(), grads)
