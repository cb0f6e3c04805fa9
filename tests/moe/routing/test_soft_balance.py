"""The balance loss of dense gates: by hand, under padding, and over ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe.routers.comet import CometRouter
from moe.routers.configs.comet_config import CometConfig
from moe.routers.configs.dselect_k_config import DSelectKConfig
from moe.routers.dselect_k import DSelectKRouter
from moe.routing.balance import soft_balance_loss
from tests.distributed_helper import run_ranks
from tests.moe.routers.routing_cases import make_context

GATES_TE = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.75, 0.25], [0.25, 0.75]], dtype=torch.float64)


def test_worked_by_hand() -> None:
    # Mass 2.5 and 1.5 of 4: f = P = (5/8, 3/8). 2 * (25 + 9) / 64 = 17/16. Balanced: 1; all on one: E.
    assert soft_balance_loss(GATES_TE, make_context()).item() == 17 / 16
    assert soft_balance_loss(torch.full((3, 4), 0.25), make_context()).item() == 1
    assert soft_balance_loss(torch.eye(4)[:1].expand(3, -1), make_context()).item() == 4
    # Gradient: E f_e / T = 2 * (5/8, 3/8) / 4.
    gates_TE = GATES_TE.clone().requires_grad_()
    soft_balance_loss(gates_TE, make_context()).backward()
    assert gates_TE.grad.tolist() == [[5 / 16, 3 / 16]] * 4


def test_padding_and_no_tokens() -> None:
    # Tokens 0 and 2: mass 1.75 and 0.25 of 2: f = P = (7/8, 1/8). 2 * 50/64
    mask = torch.tensor([[True, False, True, False]])
    assert soft_balance_loss(GATES_TE, make_context(padding_mask=mask)).item() == 100 / 64
    for context in (make_context(), make_context(padding_mask=torch.zeros(1, 0, dtype=torch.bool))):
        assert soft_balance_loss(GATES_TE[:0], context).item() == 0
    # Weights of less than 1 in all keep their shares: f = (7/8, 1/8), P = (7/40, 1/40).
    assert soft_balance_loss(GATES_TE[::2].mean(0, keepdim=True) / 5, make_context()).item() == pytest.approx(
        20 / 64
    )


@pytest.mark.parametrize(
    "router",
    [
        CometRouter(CometConfig(balance_coef=0.5), 6, 5),
        DSelectKRouter(DSelectKConfig(balance_coef=0.5), 6, 5),
    ],
    ids=["comet", "dselect_k"],
)
def test_routers_have_it(router: Any) -> None:
    routing = router(torch.randn(20, 6, generator=torch.Generator().manual_seed(0)), make_context())
    expected = soft_balance_loss(routing.scores_TE, make_context())
    assert routing.losses["balance"].item() == pytest.approx(0.5 * expected.item())
    assert not router.eval()(torch.randn(20, 6), make_context()).losses


def _gradients(rank: int, ranks: int) -> Tensor:
    """Of the gates of the rank's tokens: 1 and 3, or all 4."""
    mine_TE = (GATES_TE if ranks == 1 else (GATES_TE[:1], GATES_TE[1:])[rank]).clone().requires_grad_()
    group = torch.distributed.group.WORLD if ranks > 1 else None
    soft_balance_loss(mine_TE, make_context(group=group)).backward()
    return mine_TE.grad


@pytest.mark.distributed
def test_two_ranks_have_the_gradient_of_one() -> None:
    two = run_ranks(_gradients, 2)
    # Engines average gradients over ranks.
    torch.testing.assert_close(torch.cat(two) / 2, _gradients(0, 1))
