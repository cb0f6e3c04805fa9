"""Mixture of Depths worked by hand: who is taken, gates, the predictor and its loss.

Letters: T tokens, D model width, E experts.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.routers.configs.mod_config import MoDConfig
from moe.routers.mod import MoDRouter
from tests.distributed_helper import run_ranks
from tests.moe.routers.routing_cases import make_context, make_layer, make_router

# Four tokens: the first feature is the score of being taken, the others the logits of two experts.
X = [[0.5, 1.0, 0.0], [3.0, 0.0, 2.0], [-1.0, 0.0, 0.0], [2.0, 1.0, 0.0]]


def _router(**fields: Any) -> MoDRouter:
    router = MoDRouter(MoDConfig(**({"capacity": 0.5} | fields)), 3, 2)
    with torch.no_grad():
        router.take_D.copy_(torch.tensor([1.0, 0, 0]))
        router.weight_ED.copy_(torch.tensor([[0.0, 1, 0], [0, 0, 1]]))
        router.predictor_D.copy_(torch.tensor([2.0, 0, 0]))
        router.predictor_bias.fill_(-2)
    return router


def _taken(mask_TK: Tensor | None) -> list[bool]:
    assert mask_TK is not None
    return mask_TK[:, 0].tolist()


def test_training_takes_the_best_of_each_sequence() -> None:
    x_TD = torch.tensor(X)
    # Half of four: tokens 1 and 3, with scores 3 and 2. One of each of two sequences; ceil(1.5) = 2 of three.
    routing = _router()(x_TD, make_context())
    assert _taken(routing.slot_mask_TK) == [False, True, False, True]
    halves = _router()(x_TD.flip(0)[[0, 1, 3, 2]], make_context(token_ids=torch.zeros(2, 2)))
    # Scores 2, -1 | .5, 3
    assert _taken(halves.slot_mask_TK) == [True, False, False, True]
    mask = torch.tensor([[True, False, True, True]])
    padded = _router()(x_TD, make_context(padding_mask=mask))
    assert _taken(padded.slot_mask_TK) == [True, False, False, True]


def test_weights_are_score_times_probability() -> None:
    routing = _router()(torch.tensor(X), make_context())
    # Token 1: expert 1 by softmax(0, 2), times 3; token 3: expert 0 by softmax(1, 0), times 2
    assert routing.expert_ids_TK[[1, 3], 0].tolist() == [1, 0]
    expected = [3 / (1 + math.exp(-2)), 2 / (1 + math.exp(-1))]
    assert routing.weights_TK[[1, 3], 0].tolist() == pytest.approx(expected)
    squashed = _router(gate="sigmoid")(torch.tensor(X), make_context())
    expected = [1 / (1 + math.exp(-3)) / (1 + math.exp(-2)), 1 / (1 + math.exp(-2)) / (1 + math.exp(-1))]
    assert squashed.weights_TK[[1, 3], 0].tolist() == pytest.approx(expected)


def test_evaluation_asks_the_predictor() -> None:
    # 2 x - 2 > 0 for scores 3 and 2; alone as in company, since it sees one token.
    router = _router().eval()
    assert _taken(router(torch.tensor(X), make_context()).slot_mask_TK) == [False, True, False, True]
    for token, taken in zip(X, (False, True, False, True), strict=True):
        assert _taken(router(torch.tensor([token]), make_context()).slot_mask_TK) == [taken]


def test_predictor_loss_worked_by_hand() -> None:
    x_TD = torch.tensor(X, requires_grad=True)
    router = _router(predictor_coef=0.5, balance_coef=0.0)
    losses = router(x_TD, make_context()).losses
    # Guesses 2 x - 2 = [-1, 4, -4, 2] of [0, 1, 0, 1]: softplus of [-1, -4, -4, -2]
    expected = sum(math.log1p(math.exp(z)) for z in (-1, -4, -4, -2)) / 4
    assert losses["predictor"].item() == pytest.approx(0.5 * expected)
    losses["predictor"].backward()
    assert x_TD.grad is None, "it trains the predictor alone"
    assert router.take_D.grad is None and router.weight_ED.grad is None
    # Mean of sigmoid(guess) - member
    bias = sum(1 / (1 + math.exp(-z)) - y for z, y in ((-1, 0), (4, 1), (-4, 0), (2, 1))) / 4
    assert router.predictor_bias.grad is not None
    assert router.predictor_bias.grad.item() == pytest.approx(0.5 * bias, rel=1e-5)


def test_balance_loss_is_of_the_tokens_taken() -> None:
    losses = _router(balance_coef=1.0, predictor_coef=0.0)(torch.tensor(X), make_context()).losses
    # Tokens 1 and 3 chose expert 1 and 0: f = [1/2, 1/2], so that 2 sum f P = sum P = 1.
    assert losses["balance"].item() == pytest.approx(1)


def test_figures() -> None:
    metrics = _router()(torch.tensor(X), make_context()).metrics
    assert {name: float(value) for name, value in metrics.items()} == {
        "uncovered": 0.5,
        "predictor_right": 1.0,
    }


def test_tokens_that_are_not_taken_pass_by() -> None:
    layer = make_layer(MoDConfig(capacity=0.25))
    x = torch.randn(1, 8, 6, dtype=torch.float64)
    out = layer(x)
    silent = (out == 0).all(-1)
    assert silent.sum() == 6
    # Load counts 2 slots of 8 tokens.
    sums = layer.stats.sums[0]
    assert sums[:4].sum() == 2 and sums[-4] == 8


def test_the_predictor_learns_who_is_taken() -> None:
    router = make_router(MoDConfig(capacity=0.25, predictor_coef=1.0), 6, 4)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    right = []
    for step in range(150):
        x_TD = torch.randn(256, 6, generator=torch.Generator().manual_seed(step))
        routing = router(x_TD, make_context())
        optimizer.zero_grad()
        routing.losses["predictor"].backward()
        optimizer.step()
        right.append(float(routing.metrics["predictor_right"]))
    # Membership is a threshold on one direction, that of take_D; only its place varies with the batch.
    assert sum(right[-20:]) / 20 > 0.95
    share = router.eval()(torch.randn(4096, 6), make_context()).slot_mask_TK
    assert share is not None and share[:, 0].float().mean().item() == pytest.approx(0.25, abs=0.04)


def _work(rank: int, ranks: int) -> list[tuple[str, float, Tensor]]:
    group = torch.distributed.group.WORLD if ranks > 1 else None
    x_TD = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) > 1).view(2, 6)
    ids = torch.zeros(2, 6, dtype=torch.int64)
    share, rows = (
        slice(rank * 12 // ranks, (rank + 1) * 12 // ranks),
        slice(rank * 2 // ranks, (rank + 1) * 2 // ranks),
    )
    router = make_router(MoDConfig(capacity=0.5, top_k=2), 6, 4)
    context = make_context(group=group, padding_mask=mask[rows], token_ids=ids[rows])
    found = []
    for name, loss in router(x_TD[share], context).losses.items():
        weight = router.get_parameter("predictor_D" if name == "predictor" else "weight_ED")
        (grad,) = torch.autograd.grad(loss, weight, retain_graph=True)
        found.append((name, loss.item(), grad))
    return found


@pytest.mark.distributed
def test_losses_of_two_ranks_are_those_of_one() -> None:
    one, two = _work(0, 1), run_ranks(_work, 2)
    assert {name for name, _, _ in one} == {"predictor", "balance"}
    for (name, loss, grad), *halves in zip(one, *two, strict=True):
        assert sum(half[1] for half in halves) / 2 == pytest.approx(loss, rel=1e-5), name
        torch.testing.assert_close((halves[0][2] + halves[1][2]) / 2, grad, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"capacity": 0.0}, "capacity=0.0: it is a share of the tokens"),
        ({"capacity": 1.5}, "capacity=1.5: "),
        ({"balance_coef": -1.0}, "balance_coef=-1.0: a coefficient is not negative"),
        ({"predictor_coef": -1.0}, "predictor_coef=-1.0: a coefficient is not negative"),
    ],
)
def test_refused_configs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoDConfig(**fields)
