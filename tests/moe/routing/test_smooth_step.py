"""The smooth step: by hand, exact zeros, and its gradient."""

from __future__ import annotations

import pytest
import torch

from moe.routing.smooth_step import log_smooth_step, smooth_step


def test_values_worked_by_hand() -> None:
    # gamma 2: u = t/2 + 1/2. t = 0.5: u = 3/4, S = 9/16 * 3/2 = 27/32; 1 - S = 1/16 * 5/2 = 5/32.
    # The formula of the papers: -2 t^3/8 + 3 t/4 + 1/2 = -1/32 + 12/32 + 16/32 = 27/32.
    t = torch.tensor([-9.0, -1.0, 0.0, 0.5, 1.0, 9.0])
    one, zero = smooth_step(t, 2.0)
    assert one.tolist() == [0, 0, 1 / 2, 27 / 32, 1, 1]
    assert zero.tolist() == [1, 1, 1 / 2, 5 / 32, 0, 0]


@pytest.mark.parametrize("gamma", [0.01, 1.0, 7.0])
def test_it_is_the_cubic_of_the_papers(gamma: float) -> None:
    t = torch.linspace(-gamma, gamma, 201, dtype=torch.float64)
    cubic = -2 * t**3 / gamma**3 + 3 * t / (2 * gamma) + 0.5
    cubic = torch.where(t <= -gamma / 2, 0.0, torch.where(t >= gamma / 2, 1.0, cubic))
    one, zero = smooth_step(t, gamma)
    torch.testing.assert_close(one, cubic, rtol=0, atol=1e-15)
    torch.testing.assert_close(zero, 1 - cubic, rtol=0, atol=1e-15)
    log_one, log_zero = log_smooth_step(t, gamma)
    torch.testing.assert_close(log_one.exp(), one, rtol=1e-14, atol=0)
    torch.testing.assert_close(log_zero.exp(), zero, rtol=1e-14, atol=0)
    assert torch.equal(log_one == -torch.inf, one == 0) and torch.equal(log_zero == -torch.inf, zero == 0)


def test_gradients_worked_by_hand() -> None:
    # gamma 2, t = 0.5: 6 * 3/4 * 1/4 / 2 = 9/16; t = 0: 6/4/2 = 3/4. Exactly 0 on the edges and outside.
    t = torch.tensor([-9.0, -1.0, 0.0, 0.5, 1.0, 9.0], requires_grad=True)
    one, zero = smooth_step(t, 2.0)
    (grad_one,) = torch.autograd.grad(one.sum(), t, retain_graph=True)
    (grad_zero,) = torch.autograd.grad(zero.sum(), t)
    assert grad_one.tolist() == [0, 0, 3 / 4, 9 / 16, 0, 0]
    assert grad_zero.tolist() == [0, 0, -3 / 4, -9 / 16, 0, 0]
    # log S: (9/16) / (27/32) = 2/3, and (3/4) / (1/2) = 3/2; 0 where S is 0 or 1.
    log_one, _ = log_smooth_step(t, 2.0)
    (grad_log,) = torch.autograd.grad(log_one[log_one.isfinite()].sum(), t)
    assert grad_log.tolist() == pytest.approx([0, 0, 3 / 2, 2 / 3, 0, 0], rel=1e-6)


def test_gradients_agree_with_finite_differences() -> None:
    t = torch.linspace(-0.9, 0.9, 37, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: smooth_step(t, 2.0), t)
    assert torch.autograd.gradcheck(lambda t: log_smooth_step(t, 2.0), t)


@pytest.mark.parametrize("gamma", [1e-3, 1.0, 1e3])
def test_the_edge_of_the_band_is_finite(gamma: float) -> None:
    # The numbers next to the edge, on both sides.
    edge = torch.tensor([gamma / 2, -gamma / 2])
    inward = torch.nextafter(edge, torch.zeros(2))
    t = torch.cat([edge, inward, torch.nextafter(edge, 2 * edge), torch.tensor([1e38, -1e38])])
    t.requires_grad_()
    for log in log_smooth_step(t, gamma):
        (grad,) = torch.autograd.grad(log.masked_fill(log.isinf(), 0).sum(), t, retain_graph=True)
        assert grad.isfinite().all() and not log.isnan().any()
        assert (log[:4].isinf() | (log[:4] > -50)).all()
