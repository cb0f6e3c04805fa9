"""Rounding, repeatability and derivatives of every back end."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.expert_mlp import BACKENDS
from tests.kernels.expert_reference import (
    DTYPES,
    EVERY,
    Sizes,
    assert_agrees,
    call,
    errors,
    make_inputs,
    run_backend,
    run_reference,
    runs,
)

MEDIUM = Sizes(T=96, K=2, E=4, D=64, F=96)
KINDS = {
    "plain": MEDIUM,
    "biased": replace(MEDIUM, b_up=True, b_down=True),
    "low rank": replace(MEDIUM, rank=16),
}
LOW = [
    pytest.param(name, gated, kind, device, dtype, id=f"{name}-{gated=}-{kind}-{device}-{str(dtype)[6:]}")
    for name in BACKENDS
    for gated in (True, False)
    for kind, sizes in KINDS.items()
    for device, dtype in runs(name, sizes, DTYPES[1:])
]
ALL = [
    pytest.param(name, device, dtype, id=f"{name}-{device}-{str(dtype)[6:]}")
    for name in BACKENDS
    for device, dtype in runs(name, MEDIUM)
]
DOUBLE = [name for name in BACKENDS if ("cpu", torch.float64) in runs(name, Sizes())]


@pytest.mark.parametrize(("name", "gated", "kind", "device", "dtype"), LOW)
def test_error_is_at_most_twice_that_of_plain_torch(
    name: str, gated: bool, kind: str, device: str, dtype: torch.dtype
) -> None:
    inputs = make_inputs(replace(KINDS[kind], gated=gated)).to(dtype, device)
    reference = run_reference(inputs.to(torch.float64))
    for key, (error, norm) in errors(run_backend("loop", inputs), reference).items():
        # The yardstick itself: a rounding step for each of ~100 terms, of random sign.
        assert error <= 10 * torch.finfo(dtype).eps * norm, key
    assert_agrees(name, inputs, reference, EVERY, slack=0.0)


@pytest.mark.parametrize(("name", "device", "dtype"), ALL)
def test_two_runs_are_bitwise_equal(name: str, device: str, dtype: torch.dtype) -> None:
    # Four slots over three experts: every token meets an expert twice, sums of many terms everywhere.
    inputs = make_inputs(Sizes(T=257, K=4, E=3, D=32, F=48)).to(dtype, device)
    first = run_backend(name, inputs)
    for _ in range(2):
        again = run_backend(name, inputs)
        for key, value in first.items():
            assert torch.equal(again[key], value), key


@pytest.mark.parametrize("name", DOUBLE)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_gradcheck(name: str, gated: bool, masked: bool) -> None:
    inputs = make_inputs(Sizes(T=3, E=3, D=4, F=3, gated=gated, b_up=True, b_down=True, rank=2))
    if masked:
        inputs = replace(inputs, mask_TK=torch.tensor([[True, False], [False, False], [True, True]]))

    def function(*leaves: Tensor) -> Tensor:
        return call(name, inputs, dict(zip(inputs.tensors, leaves, strict=True)))

    leaves = [value.clone().requires_grad_() for value in inputs.tensors.values()]
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("name", DOUBLE)
def test_fp32_combine_weights_meet_fp64_experts(name: str) -> None:
    inputs = make_inputs(Sizes())
    narrow = inputs.tensors["weights"].float()
    reference = run_reference(replace(inputs, tensors={**inputs.tensors, "weights": narrow.double()}))
    found = run_backend(name, replace(inputs, tensors={**inputs.tensors, "weights": narrow}))
    assert found["weights"].dtype == torch.float32
    torch.testing.assert_close(found.pop("weights"), reference.pop("weights").float(), rtol=1e-6, atol=1e-6)
    for key, value in reference.items():
        torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-12, msg=key)
