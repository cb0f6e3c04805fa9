"""GShard's routing worked by hand: weights, the chance of the second expert, the loss of first choices.

Letters: T tokens, E experts, K = 2.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe.routers.configs.gshard_config import GShardConfig
from moe.routers.gshard import GShardRouter
from moe.types import Routing
from tests.moe.routers.router_contract import D, tokens
from tests.moe.routers.routing_cases import make_context

# softmax of ln n: [.3, .1, .4, .2]
EXP_LOGITS = [3.0, 1.0, 4.0, 2.0]


def _route(T: int = 1, training: bool = True, exp: list[float] | None = None, **fields: Any) -> Routing:
    exp = exp or EXP_LOGITS
    router = GShardRouter(GShardConfig(**fields), 1, len(exp)).train(training)
    with torch.no_grad():
        router.weight_ED.copy_(torch.tensor(exp).log()[:, None])
    return router(torch.ones(T, 1), make_context())


@pytest.mark.parametrize("second", ["paper", "mesh_tf", "sampled", "always"])
def test_evaluation_takes_the_two_best(second: str) -> None:
    routing = _route(3, training=False, second=second)
    assert routing.expert_ids_TK.tolist() == [[2, 0]] * 3 and routing.slot_mask_TK is None
    # 4 / 7 and 3 / 7
    assert routing.weights_TK[0].tolist() == pytest.approx([4 / 7, 3 / 7], rel=1e-6)


@pytest.mark.parametrize(
    ("second", "exp", "chance"),
    [
        # g2 = 3/7: 6/7, and 15/7 is more than 1
        ("paper", EXP_LOGITS, 6 / 7),
        ("mesh_tf", EXP_LOGITS, 1.0),
        # g = [.9, .1]: 2 * .1 and 5 * .1
        ("paper", [9.0, 1.0, 0.5], 0.2),
        ("mesh_tf", [9.0, 1.0, 0.5], 0.5),
        # g2 = 1/2 is always kept
        ("paper", [1.0, 1.0, 0.5], 1.0),
        ("paper", [1e30, 1e-30, 1e-31], 0.0),
    ],
)
def test_how_often_the_second_is_asked(second: str, exp: list[float], chance: float) -> None:
    T = 20000
    routing = _route(T, exp=exp, second=second)
    used_TK = routing.slot_mask_TK
    assert used_TK is not None and used_TK[:, 0].all()
    # Four standard errors, at most 0.5 / sqrt(20000) = 0.0036 each.
    assert used_TK[:, 1].float().mean().item() == pytest.approx(chance, abs=4 * 0.0036)
    if chance in (0.0, 1.0):
        assert used_TK[:, 1].all() if chance else not used_TK[:, 1].any()
    # The first keeps its weight.
    weight = exp[0] / (exp[0] + exp[1]) if exp is not EXP_LOGITS else 4 / 7
    torch.testing.assert_close(routing.weights_TK[:, 0], torch.full((T,), weight))


def test_the_sampled_second_follows_the_softmax_without_the_first() -> None:
    T = 20000
    routing = _route(T, second="sampled")
    first_T, second_T = routing.expert_ids_TK.unbind(1)
    assert (first_T == 2).all() and routing.slot_mask_TK is None
    # Without expert 2 (ln 4): 3/6, 1/6, 2/6 for experts 0, 1 and 3
    shares_E = second_T.bincount(minlength=4) / T
    assert (shares_E - torch.tensor([3 / 6, 1 / 6, 0, 2 / 6])).abs().max() < 4 * 0.0036
    # Renormalised over the two: with expert 3 it is 4 / 6 and 2 / 6
    third = routing.weights_TK[second_T == 3]
    torch.testing.assert_close(third, torch.tensor([4 / 6, 2 / 6]).expand_as(third))


def test_other_steps_draw_anew_and_the_same_step_does_not() -> None:
    router = GShardRouter(GShardConfig(), 4, 4)
    x_TD = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))

    def mask(**fields: Any) -> Tensor:
        used_TK = router(x_TD, make_context(**fields)).slot_mask_TK
        assert used_TK is not None
        return used_TK

    assert torch.equal(mask(step=1), mask(step=1))
    assert not torch.equal(mask(step=1), mask(step=2))
    assert not torch.equal(mask(step=1), mask(step=1, micro_batch=1))
    assert not torch.equal(mask(step=1), mask(step=1, layer_index=1))
    assert not torch.equal(
        GShardRouter(GShardConfig(noise_seed=5), 4, 4)(x_TD, make_context()).slot_mask_TK, mask()
    )


def test_balance_loss_counts_first_choices() -> None:
    # f = [0, 0, 1, 0], P = [.3, .1, .4, .2]: 4 * .4 = 1.6, whether or not the second is asked
    for second in ("paper", "mesh_tf", "sampled", "always"):
        losses = _route(7, second=second, balance_coef=0.5).losses
        assert losses["balance"].item() == pytest.approx(0.8, rel=1e-6)


@pytest.mark.parametrize("top_k", [1, 3])
def test_only_two_experts(top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k={top_k}: .* Set router.top_k=2, or use router=topk"):
        GShardConfig(top_k=top_k)
    message = str(GShardConfig().check(1))
    assert "more experts than the 1" in message


def test_whether_weights_sum_to_one() -> None:
    sums = {s: GShardRouter(GShardConfig(second=s), 1, 4).weights_sum_to_one for s in ("paper", "mesh_tf")}  # type: ignore[arg-type]
    assert sums == {"paper": False, "mesh_tf": False}
    assert GShardRouter(GShardConfig(second="sampled"), 1, 4).weights_sum_to_one
    assert GShardRouter(GShardConfig(second="always"), 1, 4).weights_sum_to_one


@pytest.mark.parametrize("second", ["paper", "sampled"])
def test_an_expert_that_nothing_can_choose(second: Any) -> None:
    class OneShut(GShardRouter):
        def logits(self, x_TD: Tensor) -> Tensor:
            return super().logits(x_TD).index_fill(1, torch.tensor([1]), -torch.inf)

    router = OneShut(GShardConfig(second=second), D, 4)
    x_TD = tokens().requires_grad_()
    routing = router(x_TD, make_context())
    assert not (routing.expert_ids_TK == 1).any()
    (routing.weights_TK.square().sum() + routing.losses["balance"]).backward()
    assert x_TD.grad is not None and x_TD.grad.isfinite().all()
