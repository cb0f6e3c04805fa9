"""Noisy top-k gating worked by hand, its load estimate against redrawn noise, and two ranks against one.

Letters: T tokens, D model width, E experts, K experts a token.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.routers.configs.noisy_topk_config import NoisyTopKConfig
from moe.routers.noisy_topk import NoisyTopKRouter, chance_of_selection
from moe.routing.load_importance import cv_squared
from moe.types import Routing
from tests.distributed_helper import run_ranks
from tests.moe.routers.router_contract import tokens
from tests.moe.routers.routing_cases import make_context, make_router

# softmax of ln n: [.3, .1, .4, .2]
EXP_LOGITS = [3.0, 1.0, 4.0, 2.0]


def _router(**fields: Any) -> NoisyTopKRouter:
    router = NoisyTopKRouter(NoisyTopKConfig(**fields), 1, 4)
    with torch.no_grad():
        router.weight_ED.copy_(torch.tensor(EXP_LOGITS).log()[:, None])
    return router


def _weights(router: NoisyTopKRouter) -> dict[int, float]:
    routing = router(torch.ones(1, 1), make_context())
    return dict(zip(routing.expert_ids_TK[0].tolist(), routing.weights_TK[0].tolist(), strict=True))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # ln 4 and ln 3 alone: 4/7 and 3/7
        ({}, {2: 4 / 7, 0: 3 / 7}),
        # over all, not renormalised
        ({"form": "vmoe"}, {2: 0.4, 0: 0.3}),
        ({"form": "vmoe", "top_k": 1}, {2: 0.4}),
    ],
)
def test_evaluation_is_plain_top_k(fields: dict[str, Any], expected: dict[int, float]) -> None:
    assert _weights(_router(**fields).eval()) == pytest.approx(expected, rel=1e-6)
    silent = _router(noise_scale=0.0, load_coef=0.0, **fields)
    assert _weights(silent) == pytest.approx(expected, rel=1e-6)


def test_importance_worked_by_hand() -> None:
    # Gates [3/7, 0, 4/7, 0]: mean 1/4, mean square (9 + 16) / 49 / 4 = 25/196, variance 25/196 - 1/16,
    # over the squared mean 16 * 25/196 - 1 = 51/49.
    losses = _router(noise_scale=0.0, load_coef=0.0)(torch.ones(3, 1), make_context()).losses
    assert set(losses) == {"importance"}
    assert losses["importance"].item() == pytest.approx(0.1 * 51 / 49, rel=1e-6)
    # V-MoE takes the softmax over all: squares .09 + .01 + .16 + .04 = .3, 16 * .3 / 4 - 1 = .2
    losses = _router(form="vmoe", noise_scale=0.0, load_coef=0.0)(torch.ones(3, 1), make_context()).losses
    assert losses["importance"].item() == pytest.approx(0.1 * 0.2, rel=1e-6)


def test_chance_of_selection_worked_by_hand() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0]])
    noisy = torch.tensor([[0.5, 1.5, -1.0]])
    std = torch.tensor([[1.0, 2.0, 0.5]])
    # K = 1: expert 1 is the best; the others' bar is its 1.5, its own is the next, 0.5.
    # Phi((1 - 1.5) / 1), Phi((0 - 0.5) / 2), Phi((-1 - 1.5) / 0.5)
    bars = [-0.5, -0.25, -5.0]
    expected = [0.5 * (1 + math.erf(z / math.sqrt(2))) for z in bars]
    assert chance_of_selection(logits, noisy, std, 1)[0].tolist() == pytest.approx(expected, abs=1e-7)
    # K = 2: experts 1 and 0 are in; their bar is -1, that of expert 2 is 0.5.
    bars = [2.0, 0.5, -3.0]
    expected = [0.5 * (1 + math.erf(z / math.sqrt(2))) for z in bars]
    assert chance_of_selection(logits, noisy, std, 2)[0].tolist() == pytest.approx(expected, abs=1e-7)


def test_vmoe_has_one_bar_for_all_experts() -> None:
    # As above, but the bar of K = 2 is the second best of all, 0.5, also for the two that are in:
    # Phi((1 - 0.5) / 1), Phi((0 - 0.5) / 2), Phi((-1 - 0.5) / 0.5).
    logits, noisy = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[0.5, 1.5, -1.0]])
    std = torch.tensor([[1.0, 2.0, 0.5]])
    expected = [0.5 * (1 + math.erf(z / math.sqrt(2))) for z in (0.5, -0.25, -3.0)]
    found_TE = chance_of_selection(logits, noisy, std, 2, one_bar=True)
    assert found_TE[0].tolist() == pytest.approx(expected, abs=1e-7)
    # The router's loss is the squared coefficient of variation of these sums over tokens.
    router = make_router(NoisyTopKConfig(form="vmoe", importance_coef=0.0, load_coef=1.0), 6, 4)
    x_TD = tokens()
    router.zero_grad()
    logits_TE = router.logits(x_TD)
    noisy_TE = router._add_noise(logits_TE, torch.full_like(logits_TE, 1 / 4), make_context())
    bar_T1 = noisy_TE.sort(dim=1, descending=True).values[:, 1:2]
    chance_TE = 0.5 * (1 + torch.erf((logits_TE - bar_T1) / (1 / 4) / math.sqrt(2)))
    sums = chance_TE.sum(0).double()
    theirs = sums.var(correction=0) / sums.mean() ** 2
    loss = router(x_TD, make_context()).losses["load"]
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    pair = [torch.autograd.grad(value, router.weight_ED)[0] for value in (loss, theirs)]
    torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-6)


def test_chance_of_selection_is_the_share_of_redrawn_noise() -> None:
    E, K, num = 5, 2, 20000
    g = torch.Generator().manual_seed(0)
    logits, std = torch.randn(1, E, generator=g), torch.rand(1, E, generator=g) + 0.5
    noisy = logits + std * torch.randn(1, E, generator=g)
    chance_E = chance_of_selection(logits, noisy, std, K)[0]
    for expert in range(E):
        redrawn = noisy.repeat(num, 1)
        redrawn[:, expert] = logits[0, expert] + std[0, expert] * torch.randn(num, generator=g)
        share = (redrawn.topk(K).indices == expert).any(1).float().mean()
        # Five standard errors of at most 0.5 / sqrt(20000).
        assert abs(share - chance_E[expert]) < 5 * 0.0036, expert


def test_load_is_the_expected_number_of_tokens() -> None:
    router = make_router(NoisyTopKConfig(importance_coef=0.0, load_coef=1.0), 6, 4)
    x_TD = torch.randn(3000, 6, generator=torch.Generator().manual_seed(1))
    routing = router(x_TD, make_context())
    counts_E = routing.expert_ids_TK.reshape(-1).bincount(minlength=4).double()
    # The expectation given the other experts' noise: its variation is that of the counts up to sampling.
    assert routing.losses["load"].item() == pytest.approx(cv_squared(counts_E).item(), abs=0.02)


def test_noise_has_the_learned_or_the_fixed_size() -> None:
    T = 5000
    router = _router()
    assert router.noise_weight_ED is not None
    with torch.no_grad():
        router.noise_weight_ED.copy_(torch.tensor([[-20.0], [0.0], [1.0], [3.0]]))
    logits_TE = router.logits(torch.ones(T, 1))
    std_TE = router._noise_std(torch.ones(T, 1), logits_TE)
    assert std_TE is not None
    # softplus(-20) = 2e-9, softplus(0) = ln 2, ln(1 + e), ln(1 + e^3), each plus 0.01
    expected = [0.01, math.log(2) + 0.01, math.log1p(math.e) + 0.01, math.log1p(math.e**3) + 0.01]
    assert std_TE[0].tolist() == pytest.approx(expected, rel=1e-6)
    found_E = (router._add_noise(logits_TE, std_TE, make_context()) - logits_TE).std(0)
    # A standard deviation of 5000 draws is known to 1 / sqrt(10000) of itself.
    assert found_E.tolist() == pytest.approx(expected, rel=0.05)
    fixed = _router(form="vmoe", noise_scale=2.0)
    assert fixed.noise_weight_ED is None
    std_TE = fixed._noise_std(torch.ones(1, 1), torch.zeros(1, 4))
    assert std_TE is not None and std_TE.tolist() == [[0.5] * 4]


def test_noise_lets_every_expert_be_tried() -> None:
    routing = _router()(torch.ones(200, 1), make_context())
    assert routing.expert_ids_TK.reshape(-1).bincount(minlength=4).min() > 10
    quiet = _router().eval()(torch.ones(200, 1), make_context())
    assert (quiet.expert_ids_TK == torch.tensor([2, 0])).all()


def test_every_expert_for_every_token_has_no_load_loss() -> None:
    routing = _router(top_k=4)(torch.ones(3, 1), make_context())
    assert set(routing.losses) == {"importance"}
    one = NoisyTopKRouter(NoisyTopKConfig(form="vmoe", top_k=1), 1, 1)
    losses = one(torch.ones(3, 1), make_context()).losses
    assert {name: loss.item() for name, loss in losses.items()} == {"importance": 0.0}


def test_reset_leaves_the_gate_drawn_and_the_noise_at_ln_2() -> None:
    router = make_router(NoisyTopKConfig())
    assert router.noise_weight_ED is not None and not router.noise_weight_ED.any()
    assert router.weight_ED.all()


def test_gradients_reach_gate_and_noise_and_only_in_training() -> None:
    router = make_router(NoisyTopKConfig(importance_coef=0.0, load_coef=0.0), 6, 4)
    x_TD = tokens()
    for training in (True, False):
        router.train(training).zero_grad()
        router(x_TD, make_context()).weights_TK.square().sum().backward()
        assert router.weight_ED.grad is not None and router.weight_ED.grad.any()
        assert (router.noise_weight_ED.grad is not None) is training
    # The load alone trains both.
    loaded = make_router(NoisyTopKConfig(importance_coef=0.0), 6, 4)
    loaded(x_TD, make_context()).losses["load"].backward()
    assert loaded.weight_ED.grad.any() and loaded.noise_weight_ED.grad.any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 1}, "top_k=1: the only weight is then always 1.* Set router.form=vmoe"),
        ({"noise_scale": 0.0}, "load_coef=0.1: .* Set router.load_coef=0, or router.noise_scale above 0"),
        ({"noise_scale": -1.0}, "noise_scale=-1.0: it is not negative"),
        ({"importance_coef": -0.1}, "importance_coef=-0.1: "),
        ({"load_coef": -0.1}, "load_coef=-0.1: "),
    ],
)
def test_refused_configs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoisyTopKConfig(**fields)


@pytest.mark.parametrize("form", ["shazeer", "vmoe"])
def test_an_expert_that_nothing_can_choose(form: Any) -> None:
    class OneShut(NoisyTopKRouter):
        def logits(self, x_TD: Tensor) -> Tensor:
            return super().logits(x_TD).index_fill(1, torch.tensor([1]), -torch.inf)

    router = OneShut(NoisyTopKConfig(form=form), 6, 4)
    x_TD = tokens().requires_grad_()
    routing = router(x_TD, make_context())
    assert not (routing.expert_ids_TK == 1).any()
    (routing.weights_TK.square().sum() + sum(routing.losses.values())).backward()
    assert x_TD.grad is not None and x_TD.grad.isfinite().all()
    for parameter in router.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()


def _losses_and_grads(rank: int, ranks: int, form: Any) -> tuple[Routing, list[Tensor], dict[str, float]]:
    group = torch.distributed.group.WORLD if ranks > 1 else None
    x_TD = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
    share = slice(rank * 24 // ranks, (rank + 1) * 24 // ranks)
    router = make_router(NoisyTopKConfig(form=form, importance_coef=1.0, load_coef=1.0), 6, 4)
    routing = router(x_TD[share], make_context(group=group))
    torch.stack(list(routing.losses.values())).sum().backward()
    grads = [copy.deepcopy(p.grad) for p in router.parameters() if p.grad is not None]
    return routing.expert_ids_TK, grads, {n: v.item() for n, v in routing.losses.items()}


def _both_forms(rank: int, ranks: int) -> list[Any]:
    return [_losses_and_grads(rank, ranks, form) for form in ("shazeer", "vmoe")]


@pytest.mark.distributed
def test_two_ranks_equal_one() -> None:
    """Noise, losses and the gradient that data parallelism averages."""
    for one, first, second in zip(_both_forms(0, 1), *run_ranks(_both_forms, 2), strict=True):
        assert torch.equal(torch.cat([first[0], second[0]]), one[0])
        assert first[2] == second[2] == pytest.approx(one[2], rel=1e-5)
        for a, b, expected in zip(first[1], second[1], one[1], strict=True):
            torch.testing.assert_close((a + b) / 2, expected, rtol=1e-4, atol=1e-6)
