"""Avg-K worked by hand: gates are means of keys, follow the experts, and copies are refused.

Letters: D model width, E experts, F expert width.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from moe.errors import ConfigError
from moe.experts.experts import Experts
from moe.experts.weights import ExpertBank
from moe.routers.avg_k import AvgKRouter
from moe.routers.configs.avg_k_config import AvgKConfig
from tests.moe.routers.routing_cases import make_context, make_layer

# Three experts of width 2 over D = 2, their gate rows with means [2, 0], [0, 1], [1, 1].
GATES = [[[1.0, 1.0], [3.0, -1.0]], [[0.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], [1.0, 2.0]]]


def _experts(gated: bool = True) -> Experts:
    keys = torch.tensor(GATES)
    up = torch.cat([keys, torch.full((3, 2, 2), 100.0)], dim=1) if gated else keys
    return Experts(ExpertBank(up, torch.zeros(3, 2, 2), "silu", gated))


def _router(experts: Experts | None = None, **fields: Any) -> AvgKRouter:
    router = AvgKRouter(AvgKConfig(**fields), 2, 3)
    router.attach(_experts() if experts is None else experts)
    return router


@pytest.mark.parametrize("gated", [True, False])
def test_gates_are_the_means_of_the_keys(gated: bool) -> None:
    router = _router(_experts(gated))
    assert router.mean_keys().tolist() == [[2, 0], [0, 1], [1, 1]]
    # x = [1, 2]: logits 2, 2, 3; x = [3, -1]: 6, -1, 2
    routing = router(torch.tensor([[1.0, 2.0], [3.0, -1.0]]), make_context())
    assert routing.logits_TE is not None and routing.logits_TE.tolist() == [[2, 2, 3], [6, -1, 2]]
    assert routing.expert_ids_TK[1].tolist() == [0, 2]
    assert routing.weights_TK.tolist() == [[1, 1], [1, 1]] and not routing.weights_TK.requires_grad


def test_softmax_weights_and_directions() -> None:
    routing = _router(weights="softmax")(torch.tensor([[3.0, -1.0]]), make_context())
    # softmax(6, 2)
    assert routing.weights_TK[0, 0].item() == pytest.approx(1 / (1 + torch.tensor(-4.0).exp().item()))
    # Of length 1: [1, 0], [0, 1], [.707, .707]
    unit = _router(normalise=True).mean_keys()
    torch.testing.assert_close(unit, torch.tensor([[1, 0], [0, 1], [0.5**0.5, 0.5**0.5]]))


def test_gates_follow_the_experts_and_give_them_no_gradient() -> None:
    experts = _experts()
    router = _router(experts, weights="softmax")
    x_TD = torch.tensor([[3.0, -1.0]], requires_grad=True)
    router(x_TD, make_context()).weights_TK[0, 0].backward()
    assert experts.w_up_EUD.grad is None and x_TD.grad is not None and x_TD.grad.abs().sum() > 0
    with torch.no_grad():
        experts.w_up_EUD[0] += 1
    assert router.mean_keys()[0].tolist() == [3, 1]


def test_the_experts_are_not_part_of_it() -> None:
    router = _router()
    assert not router.state_dict() and not list(router.parameters()) and not list(router.children())


def test_copies_are_warned_of_and_refused_in_training(caplog: pytest.LogCaptureFixture) -> None:
    same = Experts(ExpertBank(torch.ones(3, 4, 2), torch.zeros(3, 2, 2), "silu", True))
    with caplog.at_level(logging.WARNING, "graft.avg_k"):
        router = _router(same)
    assert "the experts' mean keys are all the same" in caplog.text and "noise_std" in caplog.text
    router.eval()(torch.ones(1, 2), make_context())
    with pytest.raises(
        ConfigError, match="router.name='avg_k': the experts' mean keys .* Make experts that differ"
    ):
        router.train()(torch.ones(1, 2), make_context())
    caplog.clear()
    _router()
    assert not caplog.text


def test_one_expert_is_no_copy() -> None:
    router = AvgKRouter(AvgKConfig(top_k=1), 2, 1)
    router.attach(Experts(ExpertBank(torch.ones(1, 4, 2), torch.zeros(1, 2, 2), "silu", True)))
    assert router(torch.ones(1, 2), make_context()).expert_ids_TK.tolist() == [[0]]


def test_it_reads_the_experts_of_its_layer() -> None:
    layer = make_layer(AvgKConfig())
    keys_EFD = layer.experts.w_up_EUD.chunk(2, dim=1)[0]
    assert isinstance(layer.router, AvgKRouter)
    torch.testing.assert_close(layer.router.mean_keys(), keys_EFD.mean(1).detach())
    assert not any("router" in name for name in layer.state_dict())


def test_no_experts_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k=0: a token needs at least one expert"):
        AvgKConfig(top_k=0)
    message = str(AvgKConfig(top_k=5).check(4))
    assert "Set router.top_k to 4 or less" in message
