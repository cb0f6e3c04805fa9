"""Expert choice worked by hand: who is taken, by sequence or micro-batch, and what it weighs.

Letters: T tokens, E experts.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch

from moe.routers.configs.expert_choice_config import ExpertChoiceConfig
from moe.routers.expert_choice import ExpertChoiceRouter
from moe.routing.slots import top_of_sequences
from moe.types import Routing
from tests.moe.routers.routing_cases import make_context

# Probabilities of four tokens for two experts; x is [ln p0, ln p1], so that the softmax gives them back.
PROBS = [[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]]


def _route(probs: list[list[float]] = PROBS, training: bool = True, **fields: Any) -> Routing:
    context = {name: fields.pop(name) for name in ("token_ids", "padding_mask") if name in fields}
    router = ExpertChoiceRouter(ExpertChoiceConfig(**fields), 2, 2).train(training)
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(2))
    return router(torch.tensor(probs).log().view(-1, 2), make_context(**context))


def _weights(routing: Routing) -> list[dict[int, float]]:
    """Expert to weight, token by token."""
    assert routing.slot_mask_TK is not None
    rows = zip(routing.expert_ids_TK, routing.weights_TK.detach(), routing.slot_mask_TK, strict=True)
    return [{int(e): round(float(w), 6) for e, w, used in zip(*row, strict=True) if used} for row in rows]


@pytest.mark.parametrize("training", [True, False])
def test_each_expert_takes_its_best_tokens(training: bool) -> None:
    # C = ceil(1 * 4 / 2) = 2: expert 0 takes tokens 0 and 1, expert 1 takes 3 and 2.
    found = _weights(_route(top_k=1, training=training))
    assert found == [{0: 0.9}, {0: 0.8}, {1: 0.4}, {1: 0.7}]


def test_tokens_get_none_or_several() -> None:
    # Both experts like tokens 0 and 1 best by sigmoid of p, with logits ln p: ln .9 > ln .5 > ln .1
    probs = [[0.9, 0.9], [0.5, 0.5], [0.1, 0.1], [0.05, 0.05]]
    routing = _route(probs, top_k=1, score="sigmoid")
    # sigmoid(ln p) = p / (1 + p): 9/19 and 1/3
    assert _weights(routing) == [
        {0: pytest.approx(9 / 19, abs=1e-6), 1: pytest.approx(9 / 19, abs=1e-6)},
        {0: pytest.approx(1 / 3, abs=1e-6), 1: pytest.approx(1 / 3, abs=1e-6)},
        {},
        {},
    ]
    figures = {name: float(value) for name, value in routing.metrics.items()}
    # 4 slots over 4 tokens, two of them without any
    assert figures == {"experts_per_token": 1.0, "most_experts": 2.0, "uncovered": 0.5}


def test_renormalised_weights_sum_to_one_where_there_are_any() -> None:
    # top_k = 2: C = 4, every token goes to both; probabilities sum to 1 already.
    assert _weights(_route(top_k=2, renormalise=True))[0] == pytest.approx({0: 0.9, 1: 0.1})
    # By sigmoid 0.9/1.9 and 0.1/1.1, over their sum: .473684 / .564593 = .838983
    found = _weights(_route(top_k=2, score="sigmoid", renormalise=True))[0]
    assert found == pytest.approx({0: 0.838983, 1: 0.161017}, abs=1e-6)
    # C = 2: whoever one expert took weighs 1.
    assert _weights(_route(top_k=1, renormalise=True)) == [{0: 1}, {0: 1}, {1: 1}, {1: 1}]


def test_sequences_are_apart() -> None:
    ids = torch.arange(4).view(2, 2)
    # Of each sequence C = 1: expert 0 takes tokens 0 and 2, expert 1 takes 1 and 3. Of all: as above.
    found = _weights(_route(top_k=1, scope="sequence", token_ids=ids))
    assert found == [{0: 0.9}, {1: 0.2}, {0: 0.6}, {1: 0.7}]
    assert _weights(_route(top_k=1, token_ids=ids)) == [{0: 0.9}, {0: 0.8}, {1: 0.4}, {1: 0.7}]


def test_padding_takes_no_place_and_is_not_counted() -> None:
    # Three real tokens: C = ceil(3/2) = 2. Token 0 is padding: expert 0 takes 1 and 2, expert 1 3 and 2.
    mask = torch.tensor([[False, True, True, True]])
    routing = _route(top_k=1, padding_mask=mask)
    assert _weights(routing) == [{}, {0: 0.8}, {0: 0.6, 1: 0.4}, {1: 0.7}]
    assert float(routing.metrics["experts_per_token"]) == pytest.approx(4 / 3)
    assert float(routing.metrics["uncovered"]) == 0


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_load_is_even_whatever_the_logits(score: Any) -> None:
    router = ExpertChoiceRouter(ExpertChoiceConfig(score=score), 4, 5)
    torch.manual_seed(0)
    for x_TD in (torch.randn(33, 4) * 50, torch.zeros(33, 4)):
        routing = router(x_TD, make_context())
        assert routing.slot_mask_TK is not None
        # ceil(2 * 33 / 5) = ceil(13.2) = 14 each
        assert routing.expert_ids_TK[routing.slot_mask_TK].bincount(minlength=5).tolist() == [14] * 5


def test_a_single_token_goes_to_every_expert() -> None:
    # ceil(1 * 1 / 2) = 1 token for each expert, as generation needs it.
    assert _weights(_route([[0.9, 0.1]], training=False, top_k=1)) == [{0: 0.9, 1: 0.1}]


@pytest.mark.parametrize(("share", "size", "expected"), [((1, 10), 30, 3), ((1, 3), 10, 4), ((1, 8), 3, 1)])
def test_budgets_round_up_and_only_up(share: tuple[int, int], size: int, expected: int) -> None:
    # 0.1 * 30 is 3 and not, rounded up from 3.0000000000000004, 4.
    scores = torch.arange(float(size)).view(1, size, 1)
    for real in (None, torch.ones(1, size, dtype=torch.bool)):
        chosen = top_of_sequences(scores, real, Fraction(*share))
        assert chosen.view(-1).tolist() == [False] * (size - expected) + [True] * expected


def test_it_says_that_it_is_not_causal() -> None:
    assert not ExpertChoiceRouter.is_causal
    assert not ExpertChoiceRouter(ExpertChoiceConfig(renormalise=True), 2, 2).weights_sum_to_one
