"""Low-rank factors and fp32 buffers in the interpreter: what the contract of all back ends does not ask."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.backend import MainGrads
from kernels.triton import triton_path
from tests.kernels.expert_reference import (
    EVERY,
    FACTORS,
    Sizes,
    assert_agrees,
    call,
    make_inputs,
    run_backend,
    run_reference,
)

WEIGHTS = ("w_up", "w_down")


@pytest.mark.parametrize(
    ("rank", "dtype"),
    [(1, torch.float32), (33, torch.float32), (16, torch.bfloat16), (128, torch.bfloat16)],
)
def test_every_rank_agrees(rank: int, dtype: torch.dtype) -> None:
    # A step and a half of the sums, an expert without rows, a token that meets an expert twice.
    sizes = Sizes(T=20, K=3, E=3, D=48, F=40, b_down=True, rank=rank, activation="drelu", scale=2.0)
    inputs = make_inputs(sizes).to(dtype)
    inputs = replace(inputs, ids_TK=torch.where(inputs.ids_TK == 1, 2, inputs.ids_TK))
    assert_agrees("triton", inputs, run_reference(inputs.to(torch.float64)), EVERY, slack=0.0)


def test_frozen_weights_cost_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[int, ...]] = []
    product = triton_path.weight_gradient

    def spy(*arguments: object) -> None:
        out = arguments[4]
        assert isinstance(out, Tensor)
        written.append(tuple(out.shape))
        product(*arguments)

    monkeypatch.setattr(triton_path, "weight_gradient", spy)
    sizes = Sizes(E=3, D=8, F=12, rank=4, b_up=True)
    run_backend("triton", make_inputs(sizes).to(torch.float32), (*FACTORS, "x"))
    assert sorted(written) == [(3, 8, 4), (3, 8, 4), (3, 12, 4), (3, 24, 4)]
    written.clear()
    run_backend("triton", make_inputs(sizes).to(torch.float32), ("b_up",))
    assert written == [(3, 24, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_get_the_sum_before_it_is_rounded(dtype: torch.dtype) -> None:
    inputs = make_inputs(Sizes(T=20, E=3, D=40, F=24, b_up=True, b_down=True)).to(dtype)
    inputs = replace(inputs, ids_TK=torch.where(inputs.ids_TK == 1, 2, inputs.ids_TK))
    plain = run_backend("triton", inputs)
    leaves = {n: v.clone().requires_grad_() for n, v in inputs.tensors.items()}

    def accumulate(start: dict[str, Tensor]) -> dict[str, Tensor]:
        buffers = {n: v.clone() for n, v in start.items()}
        for leaf in leaves.values():
            leaf.grad = None
        call("triton", inputs, leaves, MainGrads(buffers["w_up"], buffers["w_down"])).backward(inputs.grad_TD)
        assert leaves["w_up"].grad is None and leaves["w_down"].grad is None
        assert all(torch.equal(leaf.grad, plain[n]) for n, leaf in leaves.items() if n not in WEIGHTS)
        return buffers

    zeros = {n: torch.zeros_like(inputs.tensors[n], dtype=torch.float32) for n in WEIGHTS}
    once = accumulate(zeros)
    twice = accumulate(once)
    # What no one can add to without being seen: NaN where an expert has no rows.
    full = {n: torch.full_like(zeros[n], 3.0).index_fill(0, torch.tensor([1]), torch.nan) for n in WEIGHTS}
    on_top = accumulate(full)
    for n in WEIGHTS:
        assert torch.equal(once[n].to(dtype), plain[n]), n
        assert torch.equal(twice[n], 2 * once[n]), n
        others = torch.tensor([0, 2])
        assert torch.equal(on_top[n][others], 3 + once[n][others]) and on_top[n][1].isnan().all(), n
    if dtype == torch.bfloat16:
        assert not torch.equal(once["w_up"], plain["w_up"].float())
