"""SparseMixer worked by hand, its mean gradient against the exact one, and against Phi-3.5-MoE's function.

Letters: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from moe.routers.configs.sparsemixer_config import SparseMixerConfig
from moe.routers.sparsemixer import SparseMixerRouter, estimate, mask_out_of_reach
from moe.types import Routing
from tests.moe.routers.router_contract import tokens
from tests.moe.routers.routing_cases import make_context


def _route(logits: list[float], T: int = 1, training: bool = True, **fields: Any) -> Routing:
    router = SparseMixerRouter(SparseMixerConfig(**fields), 1, len(logits)).train(training)
    with torch.no_grad():
        router.weight_ED.copy_(torch.tensor(logits)[:, None])
    return router(torch.ones(T, 1), make_context())


@pytest.mark.parametrize(
    ("logits", "left", "out"),
    [
        # 0.2 * max(|z|, 10): 10 - 8 = 2 is not above 2, 10 - 7.9 is
        ([10.0, 8.0, 7.9], None, [False, False, True]),
        # -1 is the best; of -1.2 and -2: 0.2 > 0.24? no. 1 > 0.4, yes
        ([-1.0, -1.2, -2.0], None, [False, False, True]),
        # around 0: 0.1 + 0.1 > 0.2 * 0.1
        ([0.1, -0.1, 0.09], None, [False, True, False]),
        ([0.0, 0.0, 0.0], None, [False, False, False]),
        # the first is taken: the best is 8, and 8 - 7.9 is within reach
        ([10.0, 8.0, 7.9], [-math.inf, 8.0, 7.9], [True, False, False]),
        ([3.0, -math.inf, 2.9], None, [False, True, False]),
    ],
)
def test_reach_worked_by_hand(logits: list[float], left: list[float] | None, out: list[bool]) -> None:
    logits_TE = torch.tensor([logits])
    kept_TE = logits_TE.clone()
    found = mask_out_of_reach(logits_TE, torch.tensor([left or logits]), 0.1)
    assert found[0].isinf().tolist() == out
    assert torch.equal(logits_TE, kept_TE), "masked in place"


def test_evaluation_worked_by_hand() -> None:
    # Expert 2 is out of reach at first: 1 / (1 + e^-1); of those left, experts 0 and 2, 8 - 7.5 < 1.6
    routing = _route([8.0, 9.0, 7.1, 0.0], training=False, jitter=0.1)
    assert routing.expert_ids_TK.tolist() == [[1, 0]]
    assert 9 - 7.1 > 0.2 * 9 and 8 - 7.1 < 0.2 * 8
    expected = [1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-0.9))]
    assert routing.weights_TK[0].tolist() == pytest.approx(expected, rel=1e-6)
    one = _route([8.0, 9.0, 7.1, 0.0], training=False, top_k=1, version="v1")
    assert one.expert_ids_TK.tolist() == [[1]]
    assert one.weights_TK[0].tolist() == pytest.approx(expected[:1], rel=1e-6)
    assert routing.slot_mask_TK is None


@pytest.mark.parametrize(("version", "low", "share"), [("v1", 1 / 2, 1 / 2), ("v2", 1 / 3, 3 / 4)])
def test_samples_follow_the_probabilities_and_are_scaled_as_often_as_told(
    version: Any, low: float, share: float
) -> None:
    T, p = 40000, torch.tensor([1.0, 1.6, 1.4]).softmax(-1)
    routing = _route([1.0, 1.6, 1.4], T, version=version, top_k=1, jitter=1.0)
    ids_T, weights_T = routing.expert_ids_TK[:, 0], routing.weights_TK[:, 0].detach()
    # Five standard errors of at most 0.5 / sqrt(40000).
    assert (ids_T.bincount(minlength=3) / T - p).abs().max() < 5 * 0.0025
    factor_T = weights_T / p[ids_T]
    torch.testing.assert_close(factor_T[ids_T == 1], torch.ones(int((ids_T == 1).sum())))
    others_T = factor_T[ids_T != 1]
    is_low = (others_T - low).abs() < 1e-5
    assert (is_low | ((others_T - 1).abs() < 1e-5)).all()
    assert is_low.float().mean().item() == pytest.approx(share, abs=5 * 0.5 / math.sqrt(len(others_T)))


def _mean_gradient(logits_E: Tensor, f_E: Tensor, loss: Callable[[Tensor], Tensor], version: Any) -> Tensor:
    """The estimate's gradient at the logits, averaged over samples and factors by enumeration."""
    probs_E = logits_E.softmax(-1).detach()
    best, share = probs_E.argmax(), 0.5 if version == "v1" else 0.75
    total = torch.zeros_like(logits_E)
    for expert in range(len(f_E)):
        for chance, probability in ((share - 0.01, share), (share + 0.01, 1 - share)):
            leaf = logits_E.clone().requires_grad_()
            weight = leaf.softmax(-1)[expert].view(1, 1)
            is_best = torch.tensor([[bool(expert == best)]])
            scaled = estimate(weight, is_best, torch.tensor([[chance]]), version)
            (grad,) = torch.autograd.grad(loss(scaled[0, 0] * f_E[expert]), leaf)
            total += probs_E[expert] * probability * grad
    return total


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_mean_gradient_is_the_exact_one_as_far_as_the_rule_reaches(version: Literal["v1", "v2"]) -> None:
    g = torch.Generator().manual_seed(0)
    logits_E = torch.randn(4, generator=g, dtype=torch.float64)
    f_E = torch.randn(4, generator=g, dtype=torch.float64)

    def cubic(y: Tensor) -> Tensor:
        return 0.3 * y**3 - 0.7 * y**2 + 1.1 * y + 5

    def slope(y: Tensor) -> Tensor:
        return 0.9 * y**2 - 1.4 * y + 1.1

    leaf = logits_E.clone().requires_grad_()
    probs_E = leaf.softmax(-1)
    p_E, best = probs_E.detach(), int(probs_E.argmax())
    expected = torch.zeros_like(logits_E)
    for expert in range(4):
        (grad_p,) = torch.autograd.grad(probs_E[expert], leaf, retain_graph=True)
        y = p_E[expert] * f_E[expert]
        if expert == best:
            # Left as it is: the first-order estimate at the far end.
            coefficient = slope(y) * y * (2 if version == "v1" else 1)
        elif version == "v2":
            coefficient = cubic(y) - cubic(torch.zeros(()))
        else:
            # Mid-point and end-point, with the released factor of 2: half of each, twice.
            coefficient = (slope(y / 2) + slope(y)) * y
        expected += coefficient * grad_p
    found = _mean_gradient(logits_E, f_E, cubic, version)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_evaluation_agrees_with_phi() -> None:
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    router = SparseMixerRouter(SparseMixerConfig(jitter=0.3), 8, 16).eval()
    router.reset_parameters(torch.Generator().manual_seed(0))
    x_TD = 30 * torch.randn(500, 8, generator=torch.Generator().manual_seed(1))
    routing = router(x_TD, make_context())
    weights_TK, ids_TK = sparsemixer(router.logits(x_TD), 0.3, False)
    assert torch.equal(routing.expert_ids_TK, ids_TK)
    torch.testing.assert_close(routing.weights_TK, weights_TK, rtol=1e-6, atol=0)


def test_training_agrees_with_phi_on_average() -> None:
    """Pairs of experts, mean weights and mean gradient of many tokens with the same logits."""
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    T, logits = 40000, [1.0, 1.5, 1.3, 0.1]
    router = SparseMixerRouter(SparseMixerConfig(jitter=0.3), 1, 4)
    with torch.no_grad():
        router.weight_ED.copy_(torch.tensor(logits)[:, None])
    torch.manual_seed(0)
    results = []
    for ours in (True, False):
        leaf_TE = torch.tensor(logits).expand(T, 4).clone().requires_grad_()
        if ours:
            router.logits = lambda x_TD, leaf_TE=leaf_TE: leaf_TE  # type: ignore[method-assign]
            routing = router(torch.ones(T, 1), make_context())
            weights_TK, ids_TK = routing.weights_TK, routing.expert_ids_TK
        else:
            weights_TK, ids_TK = sparsemixer(leaf_TE, 0.3, True)
        (weights_TK.square() * torch.tensor([1.0, 2.0]) * (1 + ids_TK)).sum().backward()
        pairs = (ids_TK[:, 0] * 4 + ids_TK[:, 1]).bincount(minlength=16) / T
        results.append((pairs, weights_TK.detach().mean(0), leaf_TE.grad, leaf_TE.grad.mean(0)))
    (pairs, mean, grad_TE, grad_E), (their_pairs, their_mean, _, their_grad_E) = results
    # Five standard errors of a difference of two samples.
    assert (pairs - their_pairs).abs().max() < 5 * 0.5 * math.sqrt(2 / T)
    assert (mean - their_mean).abs().max() < 5 * 0.5 * math.sqrt(2 / T)
    assert ((grad_E - their_grad_E).abs() <= 5 * grad_TE.std(0) * math.sqrt(2 / T)).all()
    # Expert 3 is out of reach while a better one is left.
    assert not (pairs.view(4, 4)[3]).any() and not pairs.view(4, 4)[:, 3].any()


def test_no_gradient_to_experts_out_of_reach() -> None:
    router = SparseMixerRouter(SparseMixerConfig(balance_coef=0.0), 1, 4)
    with torch.no_grad():
        router.weight_ED.copy_(torch.tensor([[5.0], [4.9], [4.8], [1.0]]))
    router(torch.ones(50, 1), make_context()).weights_TK.sum().backward()
    assert router.weight_ED.grad is not None
    assert router.weight_ED.grad[:3].all() and not router.weight_ED.grad[3].any()


def test_balance_worked_by_hand() -> None:
    # Experts 0 and 1 in reach with 1/2 each, expert 2 not. Evaluation has no loss; training samples either.
    routing = _route([5.0, 5.0, 0.0], 4000, version="v1", top_k=1, balance_coef=1.0)
    # v1: masked probabilities [1/2, 1/2, 0], f = [n, 1 - n, 0]: 3 * 1/2, whatever n is
    assert routing.losses["balance"].item() == pytest.approx(1.5, rel=1e-5)
    # v2: softmax over all, e^5 / (2 e^5 + 1)
    routing = _route([5.0, 5.0, 0.0], 4000, top_k=1, balance_coef=1.0)
    expected = 3 * math.exp(5) / (2 * math.exp(5) + 1)
    assert routing.losses["balance"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 3}, "top_k=3: SparseMixer v2 samples at most 2 a token. Set router.top_k=2"),
        ({"version": "v1"}, "top_k=2: SparseMixer v1 samples at most 1 .* or router.version=v2"),
        ({"jitter": 0.0}, "jitter=0.0: .* Set it above 0"),
    ],
)
def test_refused_configs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseMixerConfig(**fields)


@pytest.mark.parametrize("fields", [{}, {"version": "v1", "top_k": 1}])
def test_an_expert_that_nothing_can_choose(fields: dict[str, Any]) -> None:
    class OneShut(SparseMixerRouter):
        def logits(self, x_TD: Tensor) -> Tensor:
            return super().logits(x_TD).index_fill(1, torch.tensor([1]), -torch.inf)

    router = OneShut(SparseMixerConfig(jitter=1.0, **fields), 6, 4)
    x_TD = tokens().requires_grad_()
    routing = router(x_TD, make_context())
    assert not (routing.expert_ids_TK == 1).any()
    (routing.weights_TK.square().sum() + routing.losses["balance"]).backward()
    assert x_TD.grad is not None and x_TD.grad.isfinite().all()
    assert router.weight_ED.grad is not None and router.weight_ED.grad.isfinite().all()
