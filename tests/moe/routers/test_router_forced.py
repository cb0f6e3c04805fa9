"""Round-robin routing by hand: who gets which token, even load, and the gradient that it borrows.

Letters: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe.routers.configs.forced_config import ForcedConfig
from moe.routers.forced import ForcedRouter
from moe.types import Routing
from tests.moe.routers.routing_cases import make_context, make_router


def _route(T: int, K: int, E: int, layer_index: int = 0, **fields: Any) -> Routing:
    x_TD = torch.randn(T, 6, generator=torch.Generator().manual_seed(0))
    return make_router(ForcedConfig(top_k=K), 6, E)(x_TD, make_context(layer_index, **fields))


def test_experts_in_turn() -> None:
    # 2t and 2t + 1 modulo 5
    expected = [[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]]
    routing = _route(5, 2, 5)
    assert routing.expert_ids_TK.tolist() == expected
    assert routing.weights_TK.tolist() == [[0.5, 0.5]] * 5
    # The next layer starts one expert later.
    assert _route(5, 2, 5, layer_index=1).expert_ids_TK.tolist() == [
        [(e + 1) % 5 for e in row] for row in expected
    ]


def test_padding_takes_no_turn() -> None:
    mask = torch.tensor([[True, False, True, True, False]])
    ids_TK = _route(5, 1, 3, padding_mask=mask).expert_ids_TK
    assert ids_TK[mask[0], 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("T", "K", "E"), [(12, 2, 8), (1, 1, 4), (7, 3, 3), (100, 6, 64), (23, 1, 1), (9, 2, 4)]
)
def test_load_is_even(T: int, K: int, E: int) -> None:
    routing = _route(T, K, E, layer_index=3)
    counts_E = routing.expert_ids_TK.reshape(-1).bincount(minlength=E)
    assert counts_E.max() - counts_E.min() <= (0 if T * K % E == 0 else 1)
    assert all(len(set(row)) == K for row in routing.expert_ids_TK.tolist())
    torch.testing.assert_close(routing.weights_TK, torch.full((T, K), 1 / K), rtol=0, atol=1e-7)


def test_the_gradient_is_that_of_the_softmax_over_the_chosen() -> None:
    router = ForcedRouter(ForcedConfig(), 6, 4)
    x_TD = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    upstream_TK = torch.randn(8, 2, generator=torch.Generator().manual_seed(1))
    routing = router(x_TD, make_context())
    (found,) = torch.autograd.grad((routing.weights_TK * upstream_TK).sum(), router.weight_ED)
    shares_TK = router.logits(x_TD).gather(1, routing.expert_ids_TK).softmax(-1)
    (expected,) = torch.autograd.grad((shares_TK * upstream_TK).sum(), router.weight_ED)
    assert torch.equal(found, expected) and found.any()


def test_one_expert_a_token_is_allowed_and_has_no_gradient() -> None:
    router = ForcedRouter(ForcedConfig(top_k=1), 6, 4)
    routing = router(torch.randn(8, 6), make_context())
    assert (routing.weights_TK == 1).all() and not routing.losses
    routing.weights_TK.sum().backward()
    assert router.weight_ED.grad is not None and not router.weight_ED.grad.any()


def test_more_experts_a_token_than_there_are_is_refused() -> None:
    message = str(ForcedConfig(top_k=5).check(4))
    assert "more experts than the 4" in message
