"""Balance losses worked by hand, and their minimum.

Letters: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

import math

import pytest
import torch

from moe.routing.balance import attach_loss, count_load, switch_loss, z_loss


def test_load_counts_slots_of_real_tokens() -> None:
    ids_TK = torch.tensor([[0, 1], [1, 3], [1, 0]])
    load = count_load(ids_TK, 4)
    assert load.counts_E.tolist() == [2, 3, 0, 1]
    assert (load.num_slots.item(), load.tokens_per_rank.item()) == (6, 3)
    masked = count_load(ids_TK, 4, torch.tensor([True, False, True]))
    assert masked.counts_E.tolist() == [2, 2, 0, 0]
    assert (masked.num_slots.item(), masked.tokens_per_rank.item()) == (4, 2)


def test_switch_loss_worked_by_hand() -> None:
    # Two tokens, both to expert 0: f = [1, 0]. P = ([.9, .1] + [.6, .4]) / 2 = [.75, .25].
    # 2 * (1 * .75 + 0 * .25) = 1.5
    probs_TE = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
    assert switch_loss(count_load(torch.tensor([[0], [0]]), 2), probs_TE).item() == pytest.approx(1.5)
    # Two slots a token do not double it: f sums to 1 for any K. f = [1/2, 1/2]: 2 * (.375 + .125) = 1
    assert switch_loss(count_load(torch.tensor([[0, 1], [0, 1]]), 2), probs_TE).item() == pytest.approx(1.0)


def test_switch_loss_ignores_padding() -> None:
    # The third token is padding: the numbers of the example above must come out.
    mask_T = torch.tensor([True, True, False])
    probs_TE = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.0, 1.0]], requires_grad=True)
    loss = switch_loss(count_load(torch.tensor([[0], [0], [1]]), 2, mask_T), probs_TE, mask_T)
    assert loss.item() == pytest.approx(1.5)
    loss.backward()
    # d loss / d probs[t, e] = E * f_e / tokens = 2 * [1, 0] / 2 for real tokens
    assert probs_TE.grad is not None and probs_TE.grad.tolist() == [[1, 0], [1, 0], [0, 0]]


@pytest.mark.parametrize(("E", "K"), [(2, 1), (4, 2), (8, 3)])
def test_switch_loss_is_one_at_balance_and_no_less_where_load_follows_probability(E: int, K: int) -> None:
    # Token t goes to experts t .. t + K - 1: every expert gets K of the E * K slots.
    ids_TK = (torch.arange(E)[:, None] + torch.arange(K)) % E
    uniform_TE = torch.full((E, E), 1 / E, dtype=torch.float64)
    assert switch_loss(count_load(ids_TK, E), uniform_TE).item() == pytest.approx(1.0, rel=1e-12)
    g = torch.Generator().manual_seed(E)
    for _ in range(20):
        # One distribution for all tokens, slots in its proportion: E * sum f^2 >= 1 (Cauchy-Schwarz).
        counts_E = torch.randint(0, 9, (E,), generator=g)
        counts_E[0] += 1
        ids_T1 = torch.repeat_interleave(torch.arange(E), counts_E)[:, None]
        probs_TE = (counts_E.double() / counts_E.sum()).expand(len(ids_T1), E)
        loss = switch_loss(count_load(ids_T1, E), probs_TE).item()
        share_E = [c / sum(counts_E.tolist()) for c in counts_E.tolist()]
        assert loss == pytest.approx(E * sum(s * s for s in share_E), rel=1e-6)
        assert loss >= 1 - 1e-6


def test_descending_the_switch_loss_balances() -> None:
    logits_TE = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([2.0, 0, 0, 0])
    logits_TE.requires_grad_()
    sizes = []
    for _ in range(200):
        load = count_load(logits_TE.topk(1).indices, 4)
        sizes.append(load.counts_E.max().item())
        (grad_TE,) = torch.autograd.grad(switch_loss(load, logits_TE.softmax(-1)), logits_TE)
        logits_TE = (logits_TE - 20 * grad_TE).detach().requires_grad_()
    # At first nearly all go to expert 0; 16 is balance.
    assert sizes[0] > 40 and sizes[-1] < 28


def test_z_loss_worked_by_hand() -> None:
    # logsumexp of [ln 1, ln 3] is ln 4, of [0, 0] it is ln 2: (1.921812 + 0.480453) / 2 = 1.201133
    logits_TE = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])
    load = count_load(torch.tensor([[1], [0]]), 2)
    assert z_loss(logits_TE, load.tokens_per_rank).item() == pytest.approx(1.2011327, rel=1e-6)
    # With the second token as padding: ln(4)^2 / 1
    mask_T = torch.tensor([True, False])
    load = count_load(torch.tensor([[1], [0]]), 2, mask_T)
    found = z_loss(logits_TE, load.tokens_per_rank, mask_T)
    assert found.item() == pytest.approx(math.log(4) ** 2, rel=1e-6)


def test_nothing_but_padding_gives_zero_not_nan() -> None:
    mask_T = torch.zeros(3, dtype=torch.bool)
    logits_TE = torch.randn(3, 2, requires_grad=True)
    load = count_load(torch.tensor([[0], [1], [1]]), 2, mask_T)
    losses = switch_loss(load, logits_TE.softmax(-1), mask_T), z_loss(logits_TE, load.tokens_per_rank, mask_T)
    assert [loss.item() for loss in losses] == [0.0, 0.0]
    sum(losses).backward()
    assert logits_TE.grad is not None and logits_TE.grad.tolist() == [[0.0, 0.0]] * 3


def test_counts_carry_no_gradient() -> None:
    load = count_load(torch.tensor([[0], [1]]), 2)
    assert not any(t.requires_grad for t in (load.counts_E, load.num_slots, load.tokens_per_rank))


@pytest.mark.parametrize("scale", [1.0, 0.25, 0.0])
def test_attached_loss_worked_by_hand(scale: float) -> None:
    # main = 3 * a, aux = b^2 at b = 5: d main = 3, d aux = 2 * 5 weighted by scale; aux's value is unseen.
    a, b = torch.tensor(2.0, requires_grad=True), torch.tensor(5.0, requires_grad=True)
    out = attach_loss(a, b.square(), scale)
    assert out.item() == 2.0
    (3 * out).backward()
    assert a.grad is not None and a.grad.item() == 3.0
    assert b.grad is not None and b.grad.item() == 10.0 * scale


def test_the_attached_gradient_does_not_depend_on_the_main_loss() -> None:
    # The gradient from above is 0: the balance loss is trained all the same.
    x_TD, b = torch.ones(3, 2, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    (0 * attach_loss(x_TD, 7 * b, 0.5)).sum().backward()
    assert b.grad is not None and b.grad.item() == 3.5
    assert x_TD.grad is not None and not x_TD.grad.any()


def test_losses_of_other_dtypes_can_be_attached() -> None:
    x_TD = torch.ones(3, 2, dtype=torch.bfloat16, requires_grad=True)
    b = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    attach_loss(attach_loss(x_TD, 2 * b, 0.5), b.float(), 0.5).sum().backward()
    assert b.grad is not None and b.grad.item() == 1.5
    assert x_TD.grad is not None and x_TD.grad.dtype == torch.bfloat16


def test_frozen_sides() -> None:
    x_TD, b = torch.ones(3, 2), torch.tensor(1.0, requires_grad=True)
    attach_loss(x_TD, 2 * b, 0.5).sum().backward()
    assert b.grad is not None and b.grad.item() == 1.0
    x_TD.requires_grad_()
    attach_loss(x_TD, torch.tensor(4.0), 0.5).sum().backward()
    assert x_TD.grad is not None and x_TD.grad.tolist() == [[1.0, 1.0]] * 3
