"""Skywork-MoE's routing worked by hand: normalised logits and the coefficient that follows the drop rate.

Letters: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.routers.configs.skywork_config import SkyworkConfig
from moe.routers.skywork import SkyworkRouter, drop_rate, normalise_logits
from tests.moe.routers.router_contract import tokens
from tests.moe.routers.routing_cases import make_context, make_router

# Mean 3, deviations -3, -1, 1, 3, variance (9 + 1 + 1 + 9) / 4 = 5; expert 2 has 6, expert 0 has 4.
LOGITS = [4.0, 0.0, 6.0, 2.0]
R5 = math.sqrt(5)


def _router(**fields: Any) -> SkyworkRouter:
    router = SkyworkRouter(SkyworkConfig(**fields), 1, 4)
    with torch.no_grad():
        router.weight_ED.copy_(torch.tensor(LOGITS)[:, None])
    return router


def test_normalised_logits_worked_by_hand() -> None:
    found = normalise_logits(torch.tensor([LOGITS]), 2.0)
    # 1e-6 beside a variance of 5 is a relative 1e-7.
    assert found[0].tolist() == pytest.approx([2 / R5, -6 / R5, 6 / R5, -2 / R5], rel=1e-6)
    # Neither an offset nor a factor changes it; nor does it matter how many others are shut.
    moved = normalise_logits(100 + 7 * torch.tensor([LOGITS]), 2.0)
    torch.testing.assert_close(moved, found, rtol=1e-5, atol=0)
    shut = normalise_logits(torch.tensor([[*LOGITS, -torch.inf]]), 2.0)
    torch.testing.assert_close(shut[:, :4], found)
    assert shut[0, 4] == -torch.inf


def test_the_loss_worked_by_hand() -> None:
    # Two tokens, to x and -x: P = [(a + b) / 2, (c + d) / 2, (d + c) / 2, (b + a) / 2] with a, b the softmax
    # of 1 and -1 over sqrt 5, c of -3, d of 3.
    exps = [math.exp(z / R5) for z in (1, -3, 3, -1)]
    p = [(exps[i] + exps[3 - i]) / 2 / sum(exps) for i in range(4)]
    expected = sum((1 / 4 - value) ** 2 for value in p)
    ctx, x_TD = make_context(), torch.tensor([[1.0], [-1.0]])
    found = _router(balance_coef=0.5)(x_TD, ctx).losses["balance"]
    assert found.item() == pytest.approx(0.5 * expected, rel=1e-4)
    # Each sequence by itself: a token each.
    ctx = make_context(token_ids=torch.zeros(2, 1, dtype=torch.long))
    alone = _router(balance_coef=0.5, balance_scope="sequence")(x_TD, ctx).losses["balance"]
    own = sum((1 / 4 - value / sum(exps)) ** 2 for value in exps)
    assert alone.item() == pytest.approx(0.5 * own, rel=1e-4)
    # The Switch loss counts: x goes to experts 2 and 0, -x to 1 and 3, so that f is even.
    switch = _router(balance_coef=0.5, balance_form="switch")(x_TD, make_context()).losses["balance"]
    assert switch.item() == pytest.approx(0.5, rel=1e-6)


def test_the_bias_joins_the_logits() -> None:
    router = _router()
    assert router.bias_E is not None and not router.bias_E.any()
    with torch.no_grad():
        router.bias_E.copy_(torch.tensor([-4.0, 9.0, -6.0, 2.0]))
    # Logits 0, 9, 0, 4: experts 1 and 3.
    routing = router(torch.ones(1, 1), make_context())
    assert sorted(routing.expert_ids_TK[0].tolist()) == [1, 3]
    routing.weights_TK[0, 0].backward()
    assert router.bias_E.grad is not None and router.bias_E.grad.any()
    assert set(_router(bias=False).state_dict()) == {"weight_ED", "balance_alpha"}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("fields", "scale", "renormalised"),
    [({}, 1.0, True), ({"logit_scale": 3.0}, 3.0, True), ({"renormalise": False}, 1.0, False)],
)
def test_weights_worked_by_hand(
    training: bool, fields: dict[str, Any], scale: float, renormalised: bool
) -> None:
    routing = _router(**fields).train(training)(torch.ones(1, 1), make_context())
    found = dict(zip(routing.expert_ids_TK[0].tolist(), routing.weights_TK[0].tolist(), strict=True))
    # exp(scale * z / sqrt 5) of z = 3 and 1, over their sum or that of all four
    exps = {z: math.exp(scale * z / R5) for z in (-3, -1, 1, 3)}
    total = exps[3] + exps[1] if renormalised else sum(exps.values())
    assert found == pytest.approx({2: exps[3] / total, 0: exps[1] / total}, rel=1e-5)


def test_equal_and_tiny_logits_stay_undecided_and_huge_ones_finite() -> None:
    for logits in (torch.zeros(3, 4), torch.full((3, 4), 7.0), 1e-20 * torch.randn(3, 4)):
        leaf = logits.requires_grad_()
        out = normalise_logits(leaf, 1.0)
        assert out.abs().max() < 1e-10
        out.square().sum().backward()
        assert leaf.grad is not None and leaf.grad.isfinite().all()
    assert normalise_logits(1e18 * torch.randn(3, 4), 1.0).isfinite().all()


def test_drop_rate_worked_by_hand() -> None:
    # Mean 2: above a capacity of 2 stand 3 slots of 8; above 1.5 * 2 stand 2.
    counts_E = torch.tensor([5.0, 2.0, 1.0, 0.0])
    assert drop_rate(counts_E, 1.0).item() == pytest.approx(3 / 8)
    assert drop_rate(counts_E, 1.5).item() == pytest.approx(2 / 8)
    assert drop_rate(torch.full((4,), 3.0), 1.0).item() == 0
    assert drop_rate(torch.zeros(4), 1.0).item() == 0


def test_coefficient_steps_worked_by_hand() -> None:
    # All tokens to experts 2 and 0: counts [3, 0, 3, 0], mean 1.5, dropped 3 of 6.
    router = _router(momentum=0.9, sensitivity=0.2, balance_coef=0.01, balance_coef_max=1.0)
    loss = router(torch.ones(3, 1), make_context()).losses["balance"]
    router.after_optimizer_step(make_context(step=1))
    # 0.9 * 0.01 + 0.1 * 0.2 * 0.5
    assert router.balance_alpha.item() == pytest.approx(0.019, rel=1e-6)
    routing = router(torch.ones(3, 1), make_context(step=1))
    assert routing.losses["balance"].item() == pytest.approx(1.9 * loss.item(), rel=1e-5)
    assert routing.metrics["balance_alpha"].item() == pytest.approx(0.019, rel=1e-6)
    # Bounded: 0.9 * 0.01 + 0.1 * 0.015
    router = _router(momentum=0.9, sensitivity=0.2, balance_coef=0.01, balance_coef_max=0.015)
    router(torch.ones(3, 1), make_context())
    router.after_optimizer_step(make_context(step=1))
    assert router.balance_alpha.item() == pytest.approx(0.0105, rel=1e-6)
    # A step without tokens, or in evaluation, moves nothing.
    router.after_optimizer_step(make_context(step=2))
    router.eval()(torch.ones(3, 1), make_context(step=2))
    router.after_optimizer_step(make_context(step=3))
    assert router.balance_alpha.item() == pytest.approx(0.0105, rel=1e-6)


def test_the_coefficient_is_per_layer_fp32_and_saved() -> None:
    router = _router(balance_coef=0.01)
    router.balance_alpha.fill_(0.012345)
    assert set(router.state_dict()) == {"weight_ED", "bias_E", "balance_alpha"}
    assert router.bfloat16().balance_alpha.item() == pytest.approx(0.012345, rel=1e-7)
    assert router.double().balance_alpha.dtype == torch.float32


def test_without_adaptation_the_coefficient_stays() -> None:
    for fields in ({"adaptive": False}, {"balance_coef": 0.0}):
        router = _router(**fields)
        before = router.balance_alpha.clone()
        routing = router(torch.ones(3, 1), make_context())
        router.after_optimizer_step(make_context(step=1))
        assert torch.equal(router.balance_alpha, before) and not routing.metrics
        assert set(routing.losses) == ({"balance"} if fields == {"adaptive": False} else set())


def test_the_coefficient_settles_by_layer_load() -> None:
    """A layer in balance lets go of its coefficient; one that is not tightens it."""
    found = {}
    for name, offset in (("even", 0.0), ("skewed", 3.0)):
        router = make_router(SkyworkConfig(momentum=0.9, balance_coef_max=1.0), 6, 4)
        with torch.no_grad():
            router.weight_ED[:, -1] = offset * torch.arange(4)
        g = torch.Generator().manual_seed(0)
        for step in range(100):
            x_TD = torch.randn(200, 6, generator=g)
            x_TD[:, -1] = 1
            router(x_TD, make_context(step=step))
            router.after_optimizer_step(make_context(step=step + 1))
        found[name] = router.balance_alpha.item()
    assert found["skewed"] > 2 * found["even"] and found["skewed"] > 0.02


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 1}, "top_k=1: the only weight .* Set router.renormalise=false"),
        ({"logit_scale": 0.0}, "logit_scale=0.0: it is positive"),
        ({"capacity_factor": -1.0}, "capacity_factor=-1.0: it is positive"),
        ({"sensitivity": -1.0}, "sensitivity=-1.0: it is not negative"),
        ({"balance_coef_max": -1.0}, "balance_coef_max=-1.0: it is not negative"),
        ({"momentum": 1.0}, "momentum=1.0: .* Set it from 0 to below 1"),
        ({"momentum": -0.1}, "momentum=-0.1: "),
    ],
)
def test_refused_configs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SkyworkConfig(**fields)


def test_two_experts_are_refused() -> None:
    message = str(SkyworkConfig().check(2))
    assert "always +logit_scale and -logit_scale" in message
    assert SkyworkConfig().check(3) is None


def test_an_expert_that_nothing_can_choose() -> None:
    class OneShut(SkyworkRouter):
        def logits(self, x_TD: Tensor) -> Tensor:
            return super().logits(x_TD).index_fill(1, torch.tensor([1]), -torch.inf)

    router = OneShut(SkyworkConfig(), 6, 4)
    x_TD = tokens().requires_grad_()
    routing = router(x_TD, make_context())
    assert not (routing.expert_ids_TK == 1).any()
    (routing.weights_TK.square().sum() + routing.losses["balance"]).backward()
    assert x_TD.grad is not None and x_TD.grad.isfinite().all()
    assert router.weight_ED.grad is not None and router.weight_ED.grad.isfinite().all()
