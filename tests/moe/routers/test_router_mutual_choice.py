"""Mutual choice worked by hand, and the rows of the reference's table on the logits they were made on.

Letters: T tokens, E experts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe.routers.configs.mutual_choice_config import MutualChoiceConfig
from moe.routers.mutual_choice import MutualChoiceRouter
from moe.types import Routing
from tests.moe.routers.routing_cases import make_context
from tests.moe.routers.test_router_quantile import figures, synthetic_logits


def _router(E: int = 2, **fields: Any) -> MutualChoiceRouter:
    router = MutualChoiceRouter(MutualChoiceConfig(**fields), E, E)
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(E))
    return router


def _chosen(routing: Routing) -> torch.Tensor:
    assert routing.slot_mask_TK is not None
    dense_TE = torch.zeros(len(routing.slot_mask_TK), routing.num_experts, dtype=torch.bool)
    return dense_TE.scatter_(1, routing.expert_ids_TK, routing.slot_mask_TK)


# mean k, deviation, most, tokens with none, CV, MaxVio, as the reference prints them
@pytest.mark.parametrize(
    ("score", "expected"),
    [("sigmoid", (2.0, 1.07, 6, 0.062, 1.53, 4.54)), ("softmax", (2.0, 0.75, 5, 0.0, 1.59, 4.85))],
)
def test_table_of_the_notes(score: Any, expected: tuple[float, ...]) -> None:
    router = _router(16, score=score, at_least_one=False).double()
    found = figures(_chosen(router(synthetic_logits()[0], make_context())))
    # Printed to two or three digits; the share of softmax is 1 token of 4096.
    for value, printed, step in zip(
        found.values(), expected, (0.005, 0.005, 0, 6e-4, 0.006, 0.006), strict=True
    ):
        assert value == pytest.approx(printed, abs=step + 1e-9)


# sigmoid of ln p / (1 - p) is p
PROBS = torch.tensor([[0.9, 0.8], [0.7, 0.1], [0.2, 0.3], [0.05, 0.01]])


def test_budget_worked_by_hand() -> None:
    logits = PROBS.logit()
    # Four pairs: .9, .8, .7, .3. The last token gets none, or its best beyond the budget.
    strict = _router(top_k=1, score="sigmoid", at_least_one=False)(logits, make_context())
    assert _chosen(strict).int().tolist() == [[1, 1], [1, 0], [0, 1], [0, 0]]
    guarded = _router(top_k=1, score="sigmoid")(logits, make_context())
    assert _chosen(guarded).int().tolist() == [[1, 1], [1, 0], [0, 1], [1, 0]]
    assert guarded.weights_TK[0].tolist() == pytest.approx([0.9, 0.8])
    # Without the first token the budget is three: .7, .3, .2
    mask = torch.tensor([[False, True, True, True]])
    padded = _router(top_k=1, score="sigmoid", at_least_one=False)(logits, make_context(padding_mask=mask))
    assert _chosen(padded).int().tolist() == [[0, 0], [1, 0], [1, 1], [0, 0]]


def test_evaluation_uses_the_threshold_of_the_past() -> None:
    router = _router(top_k=1, score="sigmoid", at_least_one=False, decay=0.5)
    # Before any step: top-1.
    assert _chosen(router.eval()(PROBS.logit(), make_context())).sum(1).tolist() == [1] * 4
    router.train()(PROBS.logit(), make_context())
    router.after_optimizer_step(make_context(step=1))
    # Halfway between the fourth and the fifth best: (.3 + .2) / 2
    assert router.threshold.value_N.item() == pytest.approx(0.25)
    alone = router.eval()(PROBS[:1].logit(), make_context())
    assert _chosen(alone).int().tolist() == [[1, 1]], "what exceeds it, whoever else is there"
    # A second step of .7 / .1 / .05 / .01 alone: two pairs, halfway .1 and .05; 0.5 * .25 + 0.5 * .075
    router.train()(PROBS[[1, 3]].logit(), make_context(step=1))
    router.after_optimizer_step(make_context(step=2))
    assert router.threshold.value_N.item() == pytest.approx(0.1625)


def test_balance_loss_worked_by_hand() -> None:
    # Three equal tokens, p = [.75, .25], K = 1: ties break somehow, but the budget is three pairs.
    logits = torch.tensor([[0.75, 0.25]]).log().expand(3, 2)
    routing = _router(top_k=1, at_least_one=False, balance_coef=1.0)(logits, make_context())
    assert _chosen(routing).sum(0).tolist() == [3, 0]
    # f = [1, 0]: 2 * .75
    assert routing.losses["balance"].item() == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"balance_coef": -1.0}, "balance_coef=-1.0: a coefficient is not negative"),
        ({"decay": -0.1}, "decay=-0.1: .* Set it to 0.99"),
    ],
)
def test_refused_configs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MutualChoiceConfig(**fields)
