"""Top-k routing worked by hand, its refusals, and its losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe.routers.configs.topk_config import TopKConfig
from moe.routers.topk import TopKRouter
from moe.types import Routing
from tests.moe.routers.routing_cases import make_context

# The logits of every example are ln 1, ln 2, ln 3, ln 4, in another order: expert 2 has ln 4, expert 0 ln 3.
EXP_LOGITS = [3.0, 1.0, 4.0, 2.0]


def _route(training: bool = True, **fields: Any) -> Routing:
    router = TopKRouter(TopKConfig(**fields), 1, 4).train(training)
    with torch.no_grad():
        router.weight_ED.copy_(torch.tensor(EXP_LOGITS).log()[:, None])
    return router(torch.ones(1, 1), make_context())


def _weights(**fields: Any) -> dict[int, float]:
    routing = _route(**fields)
    return dict(zip(routing.expert_ids_TK[0].tolist(), routing.weights_TK[0].tolist(), strict=True))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # softmax over all: 4/10 and 3/10
        ({"renormalise": False}, {2: 0.4, 0: 0.3}),
        # renormalised: (4/10) / (7/10) and (3/10) / (7/10)
        ({}, {2: 4 / 7, 0: 3 / 7}),
        # softmax over ln 4 and ln 3 alone: 4 / (4 + 3), 3 / (4 + 3); it sums to 1 already
        ({"order": "topk_then_score", "renormalise": False}, {2: 4 / 7, 0: 3 / 7}),
        ({"order": "topk_then_score"}, {2: 4 / 7, 0: 3 / 7}),
        # sigmoid(ln n) = n / (1 + n): 4/5 and 3/4
        ({"score": "sigmoid", "renormalise": False}, {2: 0.8, 0: 0.75}),
        # renormalised: 0.80 / 1.55 and 0.75 / 1.55
        ({"score": "sigmoid"}, {2: 0.8 / 1.55, 0: 0.75 / 1.55}),
        ({"score": "sigmoid", "order": "topk_then_score", "renormalise": False}, {2: 0.8, 0: 0.75}),
        ({"score": "sigmoid", "order": "topk_then_score"}, {2: 0.8 / 1.55, 0: 0.75 / 1.55}),
        # Switch: one expert, its probability as weight
        ({"top_k": 1, "renormalise": False}, {2: 0.4}),
        # 4/9, 3/9, 2/9 of three
        ({"top_k": 3}, {2: 4 / 9, 0: 3 / 9, 3: 2 / 9}),
        ({"top_k": 4}, {2: 0.4, 0: 0.3, 3: 0.2, 1: 0.1}),
    ],
)
def test_weights_worked_by_hand(fields: dict[str, Any], expected: dict[int, float]) -> None:
    for training in (True, False):
        found = _weights(training=training, **fields)
        assert found == pytest.approx(expected, rel=1e-6)


def test_scores_and_logits_are_reported() -> None:
    routing = _route()
    assert routing.scores_TE is not None and routing.logits_TE is not None
    assert routing.scores_TE[0].tolist() == pytest.approx([0.3, 0.1, 0.4, 0.2], rel=1e-6)
    assert routing.logits_TE[0].exp().tolist() == pytest.approx(EXP_LOGITS, rel=1e-6)
    # sigmoid(ln n) = n / (1 + n)
    sigmoid = _route(score="sigmoid").scores_TE
    assert sigmoid is not None and sigmoid[0].tolist() == pytest.approx(
        [3 / 4, 1 / 2, 4 / 5, 2 / 3], rel=1e-6
    )


def test_balance_loss_worked_by_hand() -> None:
    # f = [1/2, 0, 1/2, 0], P = [.3, .1, .4, .2]: 4 * (.15 + .2) = 1.4
    losses = _route(balance_coef=0.5).losses
    assert set(losses) == {"balance"}
    assert losses["balance"].item() == pytest.approx(0.5 * 1.4, rel=1e-6)
    # sigmoid: P = [3/4, 1/2, 4/5, 2/3] / (163/60); 4 * (3/4 + 4/5) / 2 / (163/60) = 3.1 * 60/163
    sigmoid = _route(balance_coef=0.5, score="sigmoid").losses["balance"]
    assert sigmoid.item() == pytest.approx(0.5 * 3.1 * 60 / 163, rel=1e-6)


def test_z_loss_worked_by_hand() -> None:
    # logsumexp = ln(3 + 1 + 4 + 2) = ln 10 = 2.302585, squared 5.301898
    losses = _route(balance_coef=0.0, z_coef=0.1).losses
    assert set(losses) == {"z"}
    assert losses["z"].item() == pytest.approx(0.5301898, rel=1e-6)


def test_coefficients_of_zero_leave_losses_out() -> None:
    assert not _route(balance_coef=0.0).losses
    assert not _route(balance_coef=1.0, z_coef=1.0, training=False).losses


def test_a_token_never_meets_an_expert_twice() -> None:
    router = TopKRouter(TopKConfig(top_k=3), 4, 5)
    # The second half are zeros: all logits tie.
    x_TD = torch.cat([torch.randn(20, 4), torch.zeros(20, 4)])
    ids_TK = router(x_TD, make_context()).expert_ids_TK
    assert all(len(set(row)) == 3 for row in ids_TK.tolist())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 0}, "top_k=0: a token needs at least one expert. Set it to 1 or more"),
        ({"top_k": -2}, "top_k=-2: "),
        ({"init_std": 0.0}, "init_std=0.0: a router of zeros .* Set it above 0"),
        ({"init_std": -1.0}, "init_std=-1.0: "),
        ({"balance_coef": -0.1}, "balance_coef=-0.1: a coefficient is not negative. Set it to 0 or more"),
        ({"z_coef": -1e-3}, "z_coef=-0.001: a coefficient is not negative"),
        ({"top_k": 1}, "top_k=1: the only weight is then always 1, .* Set router.renormalise=false"),
        ({"top_k": 1, "score": "sigmoid"}, "top_k=1: the only weight"),
        ({"top_k": 1, "renormalise": False, "order": "topk_then_score"}, "top_k=1: the only weight"),
    ],
)
def test_refused_configs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TopKConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "sums"),
    [
        ({}, True),
        ({"renormalise": False}, False),
        ({"renormalise": False, "order": "topk_then_score"}, True),
        ({"renormalise": False, "order": "topk_then_score", "score": "sigmoid"}, False),
        ({"score": "sigmoid"}, True),
        ({"top_k": 1, "renormalise": False, "order": "topk_then_score", "score": "sigmoid"}, False),
    ],
)
def test_whether_weights_sum_to_one(fields: dict[str, Any], sums: bool) -> None:
    assert TopKConfig(**fields).sums_to_one is sums
    assert sum(_weights(**fields).values()) == pytest.approx(1, abs=1e-6) or not sums
    assert TopKRouter(TopKConfig(**fields), 1, 4).weights_sum_to_one is sums


def test_more_experts_a_token_than_there_are_is_refused() -> None:
    message = str(TopKConfig(top_k=5).check(4))
    assert "cannot use more experts than the 4 of upcycle.num_experts" in message
    assert "Set router.top_k to 4 or less, or raise upcycle.num_experts" in message
    assert TopKConfig(top_k=4).check(4) is None


def test_initial_weights_have_the_configured_deviation() -> None:
    router = TopKRouter(TopKConfig(init_std=0.5), 200, 100)
    router.reset_parameters(torch.Generator().manual_seed(0))
    # 20000 draws: the standard error of the deviation is 0.5 / sqrt(40000) = 0.0025
    assert router.weight_ED.std().item() == pytest.approx(0.5, abs=0.01)
    assert router.weight_ED.mean().item() == pytest.approx(0.0, abs=0.015)


def test_sigmoid_scores_that_round_to_zero_still_compare() -> None:
    # Logits -200 and -200 - ln 2: both sigmoids are 0 in fp32, their ratio is 2.
    router = TopKRouter(TopKConfig(score="sigmoid"), 1, 3)
    with torch.no_grad():
        router.weight_ED.copy_(-torch.tensor([[200.0], [200 + 0.6931472], [300.0]]))
    routing = router(torch.ones(1, 1), make_context())
    found = dict(zip(routing.expert_ids_TK[0].tolist(), routing.weights_TK[0].tolist(), strict=True))
    # fp32 holds 200.69 to 1.5e-5, which is the relative error of the ratio.
    assert found == pytest.approx({0: 2 / 3, 1: 1 / 3}, rel=3e-5)
    assert routing.losses["balance"].isfinite()
