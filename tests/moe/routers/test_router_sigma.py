"""The Top-1 balance loss: by hand, where the Switch loss degenerates, and over ranks.

Letters: T tokens, E experts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe.routers.configs.sigma_config import SigmaConfig
from moe.routers.sigma import SigmaRouter
from moe.routing.balance import count_load, switch_loss, top1_loss
from tests.distributed_helper import run_ranks
from tests.moe.routers.routing_cases import make_context


def test_loss_worked_by_hand() -> None:
    probs = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]])
    ids = probs.argmax(1, keepdim=True)
    # fhat = [.4, .4, .2], squares .36; mean top-1 probability .55: 3 * .36 / .55
    assert top1_loss(probs, ids).item() == pytest.approx(3 * 0.36 / 0.55)
    # top-2: .9 and .8
    assert top1_loss(probs, probs.topk(2).indices).item() == pytest.approx(3 * 0.36 / 0.85)
    # The first token alone: squares .36 + .09 + .01 = .46
    mask = torch.tensor([True, False])
    assert top1_loss(probs, ids, mask).item() == pytest.approx(3 * 0.46 / 0.6)
    assert top1_loss(probs, ids, torch.tensor([False, False])).item() == 0


def test_extremes() -> None:
    E = 8
    even = torch.eye(E)
    # One-hot and even: 8 * 8 / 8^2 / 1 = 1, the minimum. Flat: 8 * 8 / 8^2 / (1/8) = 8. One expert: 8.
    assert top1_loss(even, even.argmax(1, keepdim=True)).item() == 1
    flat = torch.full((E, E), 1 / E)
    assert top1_loss(flat, flat.argmax(1, keepdim=True)).item() == E
    one = torch.eye(E)[:1].expand(E, E)
    assert top1_loss(one, one.argmax(1, keepdim=True)).item() == E


def _favouring(scale: float) -> Tensor:
    """Logits of 4096 tokens for 96 experts, N(0, 1) and 3 more for two of them, times a scale."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(4096, 96, generator=g, dtype=torch.float64)
    logits[:, :2] += 3
    return logits * scale


# The notes (section 6) print 11.2 -> 1.30 -> 1.003 for scales 1, .1, .001 at a MaxVio of 41.6, and 39 -> 19
# -> 68 -> 93 "as logits flatten", which is that of scales 10, 1, .1, .01. Their draws are not ours.
def test_flattening_deceives_the_switch_loss_but_not_this_one() -> None:
    switch, top1, maxvio = {}, {}, set()
    for scale in (10.0, 1.0, 0.1, 0.01, 0.001):
        logits = _favouring(scale)
        probs, ids = logits.softmax(-1), logits.argmax(-1, keepdim=True)
        load = count_load(ids, 96)
        switch[scale] = switch_loss(load, probs).item()
        top1[scale] = top1_loss(probs, ids).item()
        maxvio.add((load.counts_E.max() / load.counts_E.mean() - 1).item())
    assert len(maxvio) == 1 and maxvio.pop() == pytest.approx(41.6, rel=0.05)
    assert [switch[1.0], switch[0.1], switch[0.001]] == pytest.approx([11.2, 1.30, 1.003], rel=0.02)
    assert [top1[10.0], top1[1.0], top1[0.1], top1[0.01]] == pytest.approx([39, 19, 68, 93], rel=0.03)


def test_temperature_belongs_to_the_loss_alone() -> None:
    x_TD = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]]).log()
    routers = [SigmaRouter(SigmaConfig(temperature=t, top1_coef=0.5), 3, 3) for t in (1.0, 0.5)]
    for router in routers:
        with torch.no_grad():
            router.weight_ED.copy_(torch.eye(3))
    plain, sharp = (router(x_TD, make_context()) for router in routers)
    assert plain.weights_TK.tolist() == sharp.weights_TK.tolist()
    assert plain.weights_TK.view(-1).tolist() == pytest.approx([0.6, 0.5])
    assert plain.losses["top1"].item() == pytest.approx(0.5 * 3 * 0.36 / 0.55)
    # Squares, divided by their sums .46 and .38
    squares = torch.tensor([[0.36 / 0.46, 0.09 / 0.46, 0.01 / 0.46], [0.04 / 0.38, 0.25 / 0.38, 0.09 / 0.38]])
    expected = 3 * squares.mean(0).square().sum() / squares.amax(1).mean()
    assert sharp.losses["top1"].item() == pytest.approx(0.5 * expected.item(), rel=1e-6)


def _maxvio(logits: Tensor) -> float:
    load_E = count_load(logits.argmax(-1, keepdim=True), logits.shape[1]).counts_E
    return float(load_E.max() / load_E.mean() - 1)


def test_it_balances_where_the_switch_loss_does_not_look() -> None:
    # Gradient descent on the loss alone, over logits: uniform mean probabilities, sharp ones of a token, and
    # counts that are nearly uniform.
    g = torch.Generator().manual_seed(1)
    logits = (torch.randn(240, 12, generator=g) + 2 * torch.randn(12, generator=g)).requires_grad_()
    assert _maxvio(logits) > 3
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(300):
        probs = (logits / 0.5).softmax(-1)
        loss = top1_loss(probs, logits.argmax(-1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1.1
    assert _maxvio(logits) < 0.5


def _work(rank: int, ranks: int) -> tuple[float, Tensor]:
    group = torch.distributed.group.WORLD if ranks > 1 else None
    logits = torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask_T = torch.arange(12) > 1
    share = slice(rank * 12 // ranks, (rank + 1) * 12 // ranks)
    weight = torch.ones(5, dtype=torch.float64, requires_grad=True)
    probs = (logits[share] * weight).softmax(-1)
    loss = top1_loss(probs, logits[share].argmax(-1, keepdim=True), mask_T[share], group)
    loss.backward()
    assert weight.grad is not None
    return loss.item(), weight.grad


@pytest.mark.distributed
def test_two_ranks_equal_one() -> None:
    (loss, grad), two = _work(0, 1), run_ranks(_work, 2)
    assert [found for found, _ in two] == pytest.approx([loss, loss], rel=1e-12)
    # The mean over ranks, as engines take it; four real tokens on one rank and six on the other.
    torch.testing.assert_close((two[0][1] + two[1][1]) / 2, grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0: logits are divided by it. Set it above 0"),
        ({"top1_coef": -0.1}, "top1_coef=-0.1: a coefficient is not negative"),
    ],
)
def test_refused_configs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SigmaConfig(**fields)
