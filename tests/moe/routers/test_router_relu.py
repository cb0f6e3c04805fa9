"""ReLU routing worked by hand: gates, penalty, and the controller that steers to K experts a token.

Letters: T tokens, D model width, E experts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe.routers.configs.relu_config import ReLUConfig
from moe.routers.relu import ReLURouter
from tests.distributed_helper import run_ranks
from tests.moe.routers.routing_cases import make_context, make_router

# Three tokens, two experts; the router's weight is the identity, so that these are the logits.
LOGITS = [[2.0, -1.0], [1.0, 3.0], [-1.0, -2.0]]


def _router(E: int = 2, **fields: Any) -> ReLURouter:
    router = ReLURouter(ReLUConfig(**({"top_k": 1} | fields)), E, E)
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(E))
    return router


def test_gates_are_the_positive_logits() -> None:
    routing = _router()(torch.tensor(LOGITS), make_context())
    assert routing.slot_mask_TK is not None and routing.slot_mask_TK.sum(-1).tolist() == [1, 2, 0]
    assert routing.scores_TE is not None and routing.scores_TE.tolist() == [[2, 0], [1, 3], [0, 0]]
    assert sorted(routing.weights_TK[1].tolist()) == [1, 3]
    # Three pairs over three tokens, one token without any
    figures = {name: float(value) for name, value in routing.metrics.items()}
    assert figures == pytest.approx(
        {"experts_per_token": 1, "most_experts": 2, "uncovered": 1 / 3, "penalty": 1e-8}
    )


def test_penalty_worked_by_hand() -> None:
    # count = [2, 1], sums of gates [3, 3]: E / (K T^2) sum_e count_e sum_t g = 2/9 * (6 + 3) = 2
    loss = _router(penalty_init=0.5)(torch.tensor(LOGITS), make_context()).losses["sparsity"]
    assert loss.item() == pytest.approx(0.5 * 2)
    # Without load: the mean over tokens of the gates' sum, 6/3
    flat = _router(penalty_init=0.5, penalty_by_load=False)(torch.tensor(LOGITS), make_context())
    assert flat.losses["sparsity"].item() == pytest.approx(0.5 * 2)
    # K = 2 halves the first
    two = _router(penalty_init=0.5, top_k=2)(torch.tensor(LOGITS), make_context())
    assert two.losses["sparsity"].item() == pytest.approx(0.5)


def test_penalty_gradient_worked_by_hand() -> None:
    x_TD = torch.tensor(LOGITS, requires_grad=True)
    _router(penalty_init=1.0)(x_TD, make_context()).losses["sparsity"].backward()
    # d/dg_te = 2/9 * count_e where the gate is open: 4/9 and 2/9. Closed gates feel nothing.
    expected = torch.tensor([[4 / 9, 0], [4 / 9, 2 / 9], [0, 0]])
    torch.testing.assert_close(x_TD.grad, expected)


@pytest.mark.parametrize(
    ("batches", "factor"),
    [
        # 3 pairs of 3 tokens with K = 1: not more than K, so that it falls (as in the released code).
        ([LOGITS], 1 / 1.2),
        # 4 of 3: it rises
        ([[[2.0, 1.0], [1.0, 3.0], [-1.0, -2.0]]], 1.2),
        # The whole batch counts, micro-batches together: 3 + 4 = 7 of 6
        ([LOGITS, [[2.0, 1.0], [1.0, 3.0], [-1.0, -2.0]]], 1.2),
        # 2 + 0 of 3
        ([[[2.0, 1.0]], [[-2.0, -1.0], [-1.0, -1.0]]], 1 / 1.2),
    ],
)
def test_penalty_moves_once_a_step(batches: list[list[list[float]]], factor: float) -> None:
    router = _router(penalty_init=1.0)
    for micro_batch, logits in enumerate(batches):
        router(torch.tensor(logits), make_context(micro_batch=micro_batch))
    assert router.penalty.item() == 1.0, "forward moved it"
    router.after_optimizer_step(make_context(step=1))
    assert router.penalty.item() == pytest.approx(factor)
    router.after_optimizer_step(make_context(step=2))
    assert router.penalty.item() == pytest.approx(factor), "moved without a batch"


def test_padding_does_not_steer() -> None:
    router = _router(penalty_init=1.0)
    mask = torch.tensor([[True, False, True]])
    # Real tokens 0 and 2 have one pair: below K = 1, though the padding token has two.
    router(torch.tensor(LOGITS), make_context(padding_mask=mask))
    router.after_optimizer_step(make_context(step=1))
    assert router.penalty.item() == pytest.approx(1 / 1.2)


def test_penalty_stays_in_range_and_fp32() -> None:
    router = _router(penalty_init=1e-15)
    assert router.bfloat16().penalty.dtype == torch.float32
    router(-torch.ones(3, 2), make_context())
    router.after_optimizer_step(make_context(step=1))
    assert router.penalty.item() == pytest.approx(1e-15), "from 0 it would not come back"


def test_mean_number_of_experts_converges_to_k() -> None:
    # Of tokens around 0 half are on the open side of any gate: they need a mean, as hidden states have one.
    torch.manual_seed(0)
    router = ReLURouter(ReLUConfig(top_k=2, penalty_init=1e-4), 16, 8)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.03)
    targets_DE = torch.randn(16, 8) / 4
    used = []
    for step in range(400):
        x_TD = torch.randn(64, 16) + torch.eye(16)[0]
        routing = router(x_TD, make_context(step=step))
        assert routing.scores_TE is not None
        task = (routing.scores_TE - (x_TD @ targets_DE).relu()).square().mean()
        optimizer.zero_grad()
        (task + routing.losses["sparsity"]).backward()
        optimizer.step()
        router.after_optimizer_step(make_context(step=step + 1))
        used.append(float(routing.metrics["experts_per_token"]))
    # It starts at about half of the experts, and swings around K by a factor of 1.2 in the penalty.
    assert used[0] > 3
    assert sum(used[-200:]) / 200 == pytest.approx(2, abs=0.2)


def _work(rank: int, ranks: int) -> tuple[float, torch.Tensor]:
    group = torch.distributed.group.WORLD if ranks > 1 else None
    x_TD = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    mask_T = torch.arange(12) > 1
    share = slice(rank * 12 // ranks, (rank + 1) * 12 // ranks)
    router = make_router(ReLUConfig(penalty_init=1.0), 6, 4)
    loss = router(x_TD[share], make_context(group=group, padding_mask=mask_T[share])).losses["sparsity"]
    loss.backward()
    assert router.weight_ED.grad is not None
    return loss.item(), router.weight_ED.grad


@pytest.mark.distributed
def test_penalty_of_two_ranks_is_that_of_one() -> None:
    (loss, grad), two = _work(0, 1), run_ranks(_work, 2)
    # Engines average over ranks; rank 0 has four real tokens, rank 1 six.
    assert (two[0][0] + two[1][0]) / 2 == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close((two[0][1] + two[1][1]) / 2, grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"penalty_init": 0.0}, "penalty_init=0.0: the penalty is only ever multiplied .* Set it to 1e-8"),
        ({"penalty_factor": 1.0}, "penalty_factor=1.0: .* Set it above 1"),
        ({"top_k": 0}, "top_k=0: a token needs at least one expert"),
        ({"init_std": 0.0}, "init_std=0.0: a router of zeros"),
    ],
)
def test_refused_configs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReLUConfig(**fields)
