"""Experts whose weights carry fp32 buffers for their gradients, as Megatron hangs them on parameters."""

from __future__ import annotations

import pytest
import torch

from kernels.plan.row_plan import make_plan
from moe.dispatch.base import Dispatched
from moe.experts.experts import Experts
from moe.experts.weights import ExpertBank

WEIGHTS = ("w_up_EUD", "w_down_EDF")


def _experts(backend: str = "auto") -> Experts:
    generator = torch.Generator().manual_seed(4)
    bank = ExpertBank(
        torch.randn(4, 16, 8, generator=generator), torch.randn(4, 8, 8, generator=generator), "silu", True
    )
    experts = Experts(bank, backend).bfloat16()
    for name in WEIGHTS:
        weight = getattr(experts, name)
        weight.main_grad = torch.ones_like(weight, dtype=torch.float32)
    return experts


def _sent() -> Dispatched:
    generator = torch.Generator().manual_seed(1)
    rows_ND = torch.randn(20, 8, generator=generator).bfloat16()
    # Expert 3 is nobody's.
    plan = make_plan(torch.randint(0, 3, (20, 2), generator=generator), 4)
    return Dispatched(rows_ND, torch.rand(20, 2, generator=generator), plan)


@pytest.mark.parametrize("backend", ["auto", "loop"])
def test_gradients_are_added_in_fp32_pass_after_pass(backend: str) -> None:
    plain, experts = _experts(backend), _experts(backend)
    experts.adds_to_main_grads = True
    passes = 64
    for _ in range(passes):
        plain(_sent()).sum().backward()
        experts(_sent()).sum().backward()
    for name in WEIGHTS:
        returned, weight = getattr(plain, name), getattr(experts, name)
        assert weight.grad is None and weight.grad_added_to_main_grad
        assert (returned.main_grad == 1).all() and not hasattr(returned, "grad_added_to_main_grad")
        assert (weight.main_grad[3] == 1).all(), "an expert without rows was written to"
        once = _experts(backend)
        once(_sent()).sum().backward()
        exact = passes * getattr(once, name).grad.float()
        # One pass rounds its gradient to bf16 at most; a sum in bf16 rounds 64 times.
        ours = float((weight.main_grad - 1 - exact).norm() / exact.norm())
        theirs = float((returned.grad.float() - exact).norm() / exact.norm())
        assert ours < 2.0**-8 and ours < theirs / 2, (name, ours, theirs)


def test_who_cannot_add_returns() -> None:
    cannot = _experts("grouped_mm")
    cannot.adds_to_main_grads = True
    cannot(_sent()).sum().backward()
    no_buffer = _experts()
    no_buffer.adds_to_main_grads = True
    del no_buffer.w_down_EDF.main_grad
    no_buffer(_sent()).sum().backward()
    for experts in (cannot, no_buffer):
        assert experts.w_up_EUD.grad is not None and (experts.w_up_EUD.main_grad == 1).all()
        assert not hasattr(experts.w_up_EUD, "grad_added_to_main_grad")


def test_nothing_is_added_without_a_gradient() -> None:
    experts = _experts()
    experts.adds_to_main_grads = True
    with torch.no_grad():
        experts(_sent())
    experts.requires_grad_(False)
    sent = _sent()
    sent.rows_ND.requires_grad_()
    experts(sent).sum().backward()
    assert sent.rows_ND.grad is not None
    assert all((getattr(experts, name).main_grad == 1).all() for name in WEIGHTS)
