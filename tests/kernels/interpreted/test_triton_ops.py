"""The two operators of the Triton path: what they keep, what they write to, and that graphs hold them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.backend import ExpertTensors, LowRank, MainGrads
from kernels.expert_mlp import BACKENDS
from kernels.plan.row_plan import make_plan
from kernels.torch import expert_ops as ops
from tests.kernels.expert_reference import FACTORS, NAMES, Inputs, Sizes, call, make_inputs, run_backend

BIASED = Sizes(T=3, E=2, D=7, F=5, b_up=True, b_down=True)
# Plain experts, and everything that can be beside them.
BOTH = pytest.mark.parametrize("rich", [False, True])


def _buffers(inputs: Inputs) -> MainGrads:
    w_up, w_down = (torch.zeros_like(inputs.tensors[n], dtype=torch.float32) for n in ("w_up", "w_down"))
    return MainGrads(w_up, w_down)


def _arguments(inputs: Inputs, main: MainGrads | None, *, keep: bool) -> tuple[object, ...]:
    t, sizes = inputs.tensors, inputs.sizes
    plan = make_plan(inputs.ids_TK, sizes.E, inputs.mask_TK)
    factors = [t[name] for name in FACTORS if name in t]
    main_grads = [] if main is None else [main.w_up_EUD, main.w_down_EDF]
    index, flags = [plan.token_R, plan.slot_R, plan.row_TK, plan.counts_E], [plan.has_unused, plan.is_padded]
    leaves = [t.get(name) for name in NAMES]
    function = (sizes.activation, sizes.gated, sizes.scale, "triton")
    return (*leaves, factors, main_grads, index, flags, *function, keep)


@pytest.mark.parametrize("rank", [0, 3])
def test_without_gradients_nothing_is_kept(rank: int) -> None:
    inputs = make_inputs(Sizes(rank=rank)).to(torch.float32)
    out_TD, h_RU, low_Rr, _ = ops.experts_op(*_arguments(inputs, None, keep=False))
    assert h_RU.shape == (0, 2 * inputs.sizes.F) and low_Rr.shape == (0, rank)
    assert torch.equal(out_TD, run_backend("triton", inputs)["out"])


@pytest.mark.parametrize("rank", [0, 3])
def test_saved_for_backward_are_x_the_preactivation_and_what_has_the_rank(rank: int) -> None:
    inputs = make_inputs(Sizes(rank=rank)).to(torch.float32)
    leaves = {n: v.requires_grad_() for n, v in inputs.tensors.items()}
    saved: list[Tensor] = []

    def pack(value: Tensor) -> Tensor:
        saved.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        call("triton", inputs, leaves)
    rows = inputs.sizes.T * inputs.sizes.K
    inputs_at = {leaf.data_ptr() for leaf in leaves.values()}
    made = [v for v in saved if v.is_floating_point() and v.numel() and v.data_ptr() not in inputs_at]
    assert [tuple(v.shape) for v in made] == [(rows, 2 * inputs.sizes.F), *([(rows, rank)] if rank else [])]


@BOTH
def test_operators_pass_opcheck(rich: bool) -> None:
    sizes = replace(BIASED, rank=2 if rich else 0, activation="drelu" if rich else "silu")
    inputs = make_inputs(sizes).to(torch.float32)
    if rich:
        inputs = replace(inputs, mask_TK=torch.arange(sizes.T * sizes.K).view(sizes.T, -1) % 3 > 0)
    main = _buffers(inputs) if rich else None
    for value in inputs.tensors.values():
        value.requires_grad_()
    torch.library.opcheck(ops.experts_op, _arguments(inputs, main, keep=True))
    inputs = replace(inputs, tensors={n: v.detach() for n, v in inputs.tensors.items()})
    forward = _arguments(inputs, main, keep=True)
    kept = list(ops.experts_op(*forward)[1:])
    backward = (inputs.grad_TD, *forward[:8], kept, *forward[8:-1])
    for need in ([True] * 10, [True, False, False, True, False, False, False, True, False, False]):
        torch.library.opcheck(
            ops.experts_backward_op, (*backward, need if rich else [*need[:6], *[False] * 4])
        )


@BOTH
def test_compiles_without_a_break(rich: bool) -> None:
    inputs = make_inputs(Sizes(T=5, rank=2 if rich else 0)).to(torch.float32)
    plan = make_plan(inputs.ids_TK, inputs.sizes.E)

    def function(main: MainGrads | None, *leaves: Tensor) -> Tensor:
        x, weights, w_up, w_down, *factors = leaves
        low_rank = LowRank(*factors, 0.5) if factors else None
        experts = ExpertTensors(w_up, w_down, "silu", True, low_rank=low_rank, main_grads=main)
        return BACKENDS["triton"].run(x * 2, weights, plan, experts) + 1

    leaves = [v.requires_grad_() for v in inputs.tensors.values()]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for run in (function, compiled):
        main = _buffers(inputs) if rich else None
        out_TD = run(main, *leaves)
        grads = torch.autograd.grad(out_TD, leaves, inputs.grad_TD, allow_unused=True)
        results.append((out_TD, *grads, *((main.w_up_EUD, main.w_down_EDF) if main else ())))
    for found, expected in zip(*results, strict=True):
        assert (found is None and expected is None) or torch.equal(found, expected)
    assert [g is None for g in results[0][3:5]] == [rich, rich]


def test_buffers_may_change_between_forward_and_backward() -> None:
    # Two micro-batches forward, then both backward, as pipelines do.
    batches = [make_inputs(Sizes(), seed).to(torch.float32) for seed in (0, 1)]
    weights = {n: batches[0].tensors[n] for n in ("w_up", "w_down")}
    batches = [replace(batch, tensors={**batch.tensors, **weights}) for batch in batches]
    main = _buffers(batches[0])
    leaves = [{n: v.clone().requires_grad_() for n, v in batch.tensors.items()} for batch in batches]
    outs = [call("triton", batch, own, main) for batch, own in zip(batches, leaves, strict=True)]
    for out_TD, batch in zip(outs, batches, strict=True):
        out_TD.backward(batch.grad_TD)
    first, second = (run_backend("triton", batch) for batch in batches)
    assert torch.equal(main.w_up_EUD, first["w_up"] + second["w_up"])
    assert torch.equal(main.w_down_EDF, first["w_down"] + second["w_down"])
