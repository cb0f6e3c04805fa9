"""The activations against their formulas, and the hand-written derivatives against autograd."""

from __future__ import annotations

import pytest
import torch

from kernels.activations import ACTIVATIONS, activation_unsupported_reason
from kernels.expert_mlp import BACKENDS, BackendError
from tests.kernels.expert_reference import FORMULAS, Sizes, call, make_inputs

# Zero is where relu and relu2 turn; 40 is where exp(-x) leaves no trace in fp32.
POINTS = torch.cat([torch.linspace(-40, 40, 81), torch.linspace(-3, 3, 61), torch.tensor([0.0, -0.0, 1e-30])])


def test_every_activation_has_a_formula() -> None:
    assert set(ACTIVATIONS) == set(FORMULAS)


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_values_follow_the_formula(name: str) -> None:
    x = POINTS.double()
    torch.testing.assert_close(ACTIVATIONS[name].forward(x), FORMULAS[name](x), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", list(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_writing_into_a_buffer_gives_the_same_value(name: str, dtype: torch.dtype) -> None:
    # Halves of a wider matrix, as the gate of a gated expert is.
    wide = torch.stack([POINTS, POINTS.flip(0)]).repeat(1, 2).to(dtype)
    x, out = wide.chunk(2, dim=1)[0], torch.full_like(wide, 7.0).chunk(2, dim=1)[1]
    ACTIVATIONS[name].forward_out(x, out)
    assert torch.equal(out, ACTIVATIONS[name].forward(x))


@pytest.mark.parametrize("name", list(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_place", [True, False])
def test_derivative_equals_autograd(name: str, dtype: torch.dtype, in_place: bool) -> None:
    wide = torch.stack([POINTS, POINTS.flip(0)]).repeat(1, 2).to(dtype)
    x = wide.chunk(2, dim=1)[0]
    kept = wide.clone()
    grad = torch.linspace(-2, 2, x.numel()).view_as(x).to(dtype)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(ACTIVATIONS[name].forward(leaf), leaf, grad)
    out = grad if in_place else torch.full_like(wide, 7.0).chunk(2, dim=1)[1]
    ACTIVATIONS[name].backward_out(grad, x, out)
    # One rounding step of the value, and of the terms of size 2 that cancel in the tails, which torch adds
    # up in fp32 at least, by other instructions where memory is strided.
    inner = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    torch.testing.assert_close(out, expected, rtol=torch.finfo(dtype).eps, atol=2 * inner)
    assert torch.equal(wide, kept), "the input was written to"


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_derivative_passes_gradcheck_away_from_the_kink(name: str) -> None:
    x = torch.tensor([-5.0, -1.5, -0.3, 0.2, 1.1, 6.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ACTIVATIONS[name].forward, x)


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_nan_is_passed_on(name: str) -> None:
    x = torch.tensor([1.0, float("nan")])
    assert ACTIVATIONS[name].forward(x).isnan().tolist() == [False, True]
    assert ACTIVATIONS[name].forward_out(x, torch.empty(2)).isnan().tolist() == [False, True]


def test_drelu_asks_for_a_gate() -> None:
    assert (
        activation_unsupported_reason("drelu", True) is None
        and activation_unsupported_reason("relu", False) is None
    )
    assert "no gate" in str(activation_unsupported_reason("drelu", False))
    assert "there are: silu" in str(activation_unsupported_reason("mish", True))
    inputs = make_inputs(Sizes(activation="drelu", gated=False))
    for name in BACKENDS:
        with pytest.raises(BackendError, match="no gate"):
            call(name, inputs, inputs.tensors)
