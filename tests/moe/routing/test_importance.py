"""The importance loss by hand, against finite differences, under padding, accumulation and over ranks.

Letters: T tokens, D model width, E experts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe.routers.configs.topk_config import TopKConfig
from moe.routing.load_importance import cv_squared, importance_loss
from moe.routing.scope import BalanceScope
from moe.routing.step_state import StepSums
from tests.distributed_helper import run_ranks
from tests.moe.routers.routing_cases import make_context, make_router

SCOPES: tuple[BalanceScope, ...] = ("micro_batch", "sequence", "global_batch")


def _probs(num: int = 12, E: int = 4, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(num, E, generator=g, dtype=torch.float64).softmax(-1)


def test_variation_worked_by_hand() -> None:
    # mean 2, variance (1 + 0 + 1) / 3
    assert cv_squared(torch.tensor([1.0, 2.0, 3.0])).item() == pytest.approx(2 / 3 / 4)
    assert cv_squared(torch.full((5,), 7.0)).item() == 0
    assert cv_squared(torch.zeros(4)).item() == 0


def test_loss_worked_by_hand() -> None:
    # Sums 1.5 and 0.5: mean 1, variance 1/4. In other units the same: the mean is the only divisor.
    probs_TE = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
    for factor in (1, 10):
        found = importance_loss("micro_batch", factor * probs_TE, make_context())
        assert found.item() == pytest.approx(0.25)
    # Even: 0. All on one of E: mean T/E, E - 1 others at 0: E - 1.
    assert importance_loss("micro_batch", torch.full((3, 4), 0.25), make_context()).item() == 0
    one_hot_TE = torch.eye(4)[:1].expand(3, -1)
    assert importance_loss("micro_batch", one_hot_TE, make_context()).item() == pytest.approx(3)
    # Each sequence by itself: sums (.9, .1) and (.6, .4): variances .16 and .01 over .25, and their mean.
    two = make_context(token_ids=torch.zeros(2, 1))
    assert importance_loss("sequence", probs_TE, two).item() == pytest.approx((0.64 + 0.04) / 2)


@pytest.mark.parametrize("scope", SCOPES)
def test_padding_has_no_part(scope: BalanceScope) -> None:
    probs_TE = _probs()
    mask_BS = torch.tensor([[True] * 4 + [False] * 2, [False] * 2 + [True] * 4])
    fields = {"token_ids": torch.zeros(2, 6), "padding_mask": mask_BS}
    other_TE = torch.where(mask_BS.view(-1, 1), probs_TE, _probs(seed=9))
    one = importance_loss(scope, probs_TE, make_context(**fields), StepSums())
    other = importance_loss(scope, other_TE, make_context(**fields), StepSums())
    alone = make_context(token_ids=torch.zeros(2, 4))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
    expected = importance_loss(scope, probs_TE[mask_BS.view(-1)], alone, StepSums())
    torch.testing.assert_close(one, expected, rtol=1e-12, atol=0)
    nothing = make_context(token_ids=torch.zeros(2, 6), padding_mask=torch.zeros(2, 6, dtype=torch.bool))
    none_TE = probs_TE.clone().requires_grad_()
    loss = importance_loss(scope, none_TE, nothing, StepSums())
    loss.backward()
    assert loss.item() == 0 and none_TE.grad is not None and not none_TE.grad.any()


@pytest.mark.parametrize("scope", SCOPES)
def test_gradient_agrees_with_finite_differences(scope: BalanceScope) -> None:
    mask_BS = torch.arange(12).view(2, 6) % 5 != 1
    fields = {"token_ids": torch.zeros(2, 6), "padding_mask": mask_BS, "num_micro_batches": 2}

    def loss(gates_TE: Tensor) -> Tensor:
        history = StepSums()
        # An earlier micro-batch of the step: a constant for the second one.
        importance_loss(scope, _probs(seed=3), make_context(**fields), history)
        return importance_loss(scope, gates_TE, make_context(micro_batch=1, **fields), history)

    gates_TE = _probs().requires_grad_()
    # Central differences of 1e-6 in fp64: errors of 1e-12 and of 1e-16 / 1e-6.
    assert torch.autograd.gradcheck(loss, gates_TE, eps=1e-6, atol=1e-8, rtol=1e-6)


def test_global_batch_is_the_batch_of_the_micro_batches() -> None:
    parts = [_probs(seed=seed) for seed in range(3)]
    history = StepSums()
    for micro, part in enumerate(parts):
        for _ in range(2):  # recomputation counts once
            found = importance_loss("global_batch", part, make_context(micro_batch=micro), history)
        expected = importance_loss("micro_batch", torch.cat(parts[: micro + 1]), make_context())
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    # The next step begins anew.
    found = importance_loss("global_batch", parts[0], make_context(step=1), history)
    assert found == importance_loss("micro_batch", parts[0], make_context())


def test_descending_it_evens_out_importance() -> None:
    bias_E = torch.tensor([2.0, 0, 0, -1], dtype=torch.float64, requires_grad=True)
    logits_TE = torch.randn(64, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = []
    for _ in range(100):
        loss = importance_loss("micro_batch", (logits_TE + bias_E).softmax(-1), make_context())
        (grad_E,) = torch.autograd.grad(loss, bias_E)
        bias_E = (bias_E - 0.5 * grad_E).detach().requires_grad_()
        values.append(loss.item())
    assert values[0] > 0.5 and values[-1] < 1e-3


def test_linear_routers_have_it() -> None:
    x_TD = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    router = make_router(TopKConfig(balance_coef=0.0, importance_coef=0.5))
    routing = router(x_TD, make_context())
    expected = importance_loss("micro_batch", routing.scores_TE, make_context())
    assert {name: loss.item() for name, loss in routing.losses.items()} == {
        "importance": 0.5 * expected.item()
    }
    assert not router.eval()(x_TD, make_context()).losses
    with pytest.raises(ValueError, match="importance_coef=-1: a coefficient is not negative"):
        TopKConfig(importance_coef=-1)


def _gradients(rank: int, ranks: int) -> dict[str, Any]:
    """Two micro-batches of this rank's sequences: gradients, and the losses' values."""
    group = torch.distributed.group.WORLD if ranks > 1 else None
    found: dict[str, Any] = {}
    for scope in SCOPES:
        history, values, grads = StepSums(), [], []
        for micro in range(2):
            share = slice(rank * 12 // ranks, (rank + 1) * 12 // ranks)
            gates_TE = _probs(seed=micro)[share].clone().requires_grad_()
            fields = {"token_ids": torch.zeros(2 // ranks, 6), "micro_batch": micro, "group": group}
            loss = importance_loss(scope, gates_TE, make_context(**fields), history)
            loss.backward()
            values.append(loss.item())
            grads.append(gates_TE.grad)
        found[scope] = (values, grads)
    return found


@pytest.mark.distributed
def test_two_ranks_equal_one() -> None:
    one, two = _gradients(0, 1), run_ranks(_gradients, 2)
    for scope in SCOPES:
        values, grads = one[scope]
        means = [sum(pair) / 2 for pair in zip(two[0][scope][0], two[1][scope][0], strict=True)]
        assert means == pytest.approx(values, rel=1e-12), scope
        for micro, expected in enumerate(grads):
            # Engines average gradients over ranks.
            both = torch.cat([result[scope][1][micro] for result in two]) / 2
            torch.testing.assert_close(both, expected, rtol=1e-10, atol=1e-14, msg=scope)
