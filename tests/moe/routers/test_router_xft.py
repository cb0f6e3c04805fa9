"""XFT's gate, worked by hand.

Letters: T tokens, D model width, E experts, K experts a token.
"""

from __future__ import annotations

import math

import pytest
import torch

from moe.routers.configs.xft_config import XFTConfig
from moe.upcycle.gates import observe
from tests.moe.routers.routing_cases import make_context, make_router


def test_weights_worked_by_hand() -> None:
    router = make_router(XFTConfig(top_k=3, balance_coef=0.0), 3, 4)
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(3) * math.log(2))
    # Logits ln 2 times (3, 1, 2): p is (8, 2, 4) / 14; the best are the first and the third of the others.
    routing = router(torch.tensor([[3.0, 1.0, 2.0]]), make_context())
    p = [8 / 14, 4 / 14]
    shares = torch.tensor(p).softmax(0)
    assert routing.expert_ids_TK.tolist() == [[0, 1, 3]]
    expected = [1 - p[0], p[0] * float(shares[0]), p[0] * float(shares[1])]
    assert routing.weights_TK[0].tolist() == pytest.approx(expected)
    assert float(routing.weights_TK.detach().sum()) == pytest.approx(1)
    assert routing.scores_TE is not None
    assert routing.scores_TE[0].tolist() == pytest.approx([6 / 14, *(8 / 14 * q / 14 for q in (8, 2, 4))])


def test_the_balance_loss_is_of_the_others_alone() -> None:
    router = make_router(XFTConfig(balance_coef=1.0), 2, 3).train()
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(2))
    # Two tokens that choose one other each: even, though expert 0 has both.
    routing = router(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), make_context())
    assert routing.expert_ids_TK.tolist() == [[0, 1], [0, 2]]
    assert float(routing.losses["balance"]) == pytest.approx(1)


def test_copies_are_exact() -> None:
    gates = observe(XFTConfig(), 4)
    assert gates.constant and gates.total == 1 and not gates.has_rows


def test_a_single_expert_is_refused() -> None:
    with pytest.raises(ValueError, match="a choice needs another"):
        XFTConfig(top_k=1)
