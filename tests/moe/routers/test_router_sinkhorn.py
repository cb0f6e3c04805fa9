"""Sinkhorn routing against Megatron-core's own loop, and by hand.

Letters: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moe.routers.configs.sinkhorn_config import SinkhornConfig
from moe.routers.sinkhorn import SinkhornRouter
from moe.routing.sinkhorn_rule import SinkhornRule
from moe.routing.transport import sinkhorn
from tests.moe.routers.routing_cases import make_context
from tests.moe.routing.test_transport import normal

pytestmark = pytest.mark.usefixtures("one_thread")
MEGATRON = SinkhornRule(1000, 1e-4, residual="column_potentials", rows_last=False, check_every=4)


def of_logits(config: SinkhornConfig, E: int) -> SinkhornRouter:
    """A router whose logits are its input, in fp64."""
    router = SinkhornRouter(config, E, E).double()
    router.weight_ED = nn.Parameter(torch.eye(E, dtype=torch.float64))
    return router


def test_one_iteration_by_hand() -> None:
    # exp(Z) = [[1, 3], [1, 2]]: both tokens like expert 1 better. Rows (4, 3); columns 1/4 + 1/3 = 7/12 and
    # 3/4 + 2/3 = 17/12, so exp(v) = (12/7, 12/17). Rows of exp(Z + v): (1.71, 2.12) and (1.71, 1.41).
    logits_TE = torch.tensor([[1.0, 3.0], [1.0, 2.0]], dtype=torch.float64).log()
    routing = of_logits(SinkhornConfig(top_k=1, max_iterations=1), 2)(logits_TE, make_context())
    assert routing.expert_ids_TK.tolist() == [[1], [0]]
    # The weight is the sigmoid of the raw logit: 3 / (1 + 3), and 1 / (1 + 1).
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[0.75], [0.5]], dtype=torch.float64))
    # One of two tokens goes where it would in evaluation.
    assert routing.metrics["choice_agreement"].item() == 0.5
    plain = of_logits(SinkhornConfig(top_k=1), 2).eval()(logits_TE, make_context())
    assert plain.expert_ids_TK.tolist() == [[1], [1]] and not plain.metrics


def test_two_of_three_experts_keep_the_softmax_over_all() -> None:
    # One token, so the plan is uniform and its order that of ties; the weights are 2/7 and 4/7 at least for
    # the two of evaluation, of exp(Z) = (1, 2, 4).
    logits_TE = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64).log()
    router = of_logits(SinkhornConfig(), 3).eval()
    routing = router(logits_TE, make_context())
    order_TK = routing.expert_ids_TK.argsort(-1)
    assert routing.expert_ids_TK.gather(1, order_TK).tolist() == [[1, 2]]
    expected_TK = torch.tensor([[2 / 7, 4 / 7]], dtype=torch.float64)
    torch.testing.assert_close(routing.weights_TK.gather(1, order_TK), expected_TK)
    assert not router.weights_sum_to_one and of_logits(SinkhornConfig(top_k=3), 3).weights_sum_to_one


def by_multiplication(logits_TE: Tensor, tolerance: float = 1e-4) -> tuple[Tensor, int]:
    """Megatron's loop without the 1e-8 in its divisors: plan of mass 1, iterations."""
    T, E = logits_TE.shape
    kernel_TE, d1_E, iterations, change = logits_TE.exp(), logits_TE.new_ones(E), 0, 1.0
    while change > tolerance:
        d0_T = 1 / (T * (kernel_TE @ d1_E))
        new_E = 1 / (E * (d0_T @ kernel_TE))
        change, d1_E, iterations = float((new_E - d1_E).abs().mean()), new_E, iterations + 1
    return d0_T[:, None] * kernel_TE * d1_E, iterations


@pytest.mark.slow
@pytest.mark.parametrize(
    ("T", "E", "scale", "atol"),
    # The 1e-8 that Megatron adds to sums of about 1 / E and more is relative 1e-8 E a step. On the last, that
    # needs 116 iterations, it saves one: they differ by the change of an iteration at the tolerance.
    [(64, 8, 1.0, 0.0), (500, 16, 2.0, 0.0), (333, 5, 0.1, 0.0), (7, 7, 3.0, 1e-5)],
)
def test_same_result_as_megatrons_loop(T: int, E: int, scale: float, atol: float) -> None:
    from megatron.core.transformer.moe.moe_utils import sinkhorn as megatron_sinkhorn

    logits_TE = scale * normal(T, E) + normal(E, seed=1)
    found = sinkhorn(logits_TE, MEGATRON)
    plan_TE, iterations = by_multiplication(logits_TE)
    assert found.iterations == iterations
    # The total mass there is 1, here T.
    torch.testing.assert_close(found.plan(logits_TE) / T, plan_TE, rtol=1e-12, atol=0)
    torch.testing.assert_close(plan_TE, megatron_sinkhorn(logits_TE), rtol=1e-5, atol=atol)
    for K in (1, 2, 3):
        expected_TK = megatron_sinkhorn(logits_TE.float()).topk(K, dim=1).indices
        routing = of_logits(SinkhornConfig(top_k=K, max_iterations=1000), E)(logits_TE, make_context())
        # A column potential in fp32 is off by some 1e-6, which decides a near-tie at times.
        same_T = (routing.expert_ids_TK.sort(-1).values == expected_TK.sort(-1).values).all(-1)
        assert same_T.float().mean() > 0.99
        dense_TE = logits_TE.sigmoid() if K == 1 else logits_TE.softmax(-1)
        assert torch.equal(routing.weights_TK, dense_TE.gather(1, routing.expert_ids_TK))


@pytest.mark.slow
def test_logits_that_megatrons_loop_overflows_on() -> None:
    from megatron.core.transformer.moe.moe_utils import sinkhorn as megatron_sinkhorn

    logits_TE = normal(40, 4).float()
    assert not megatron_sinkhorn(logits_TE + 100).isfinite().all()
    router = SinkhornRouter(SinkhornConfig(), 4, 4)
    router.weight_ED = nn.Parameter(torch.eye(4))
    one, other = (router(logits_TE + shift, make_context()) for shift in (0, 100))
    same_T = (one.expert_ids_TK.sort(-1).values == other.expert_ids_TK.sort(-1).values).all(-1)
    # Adding 100 in fp32 rounds the logits to 8e-6.
    assert same_T.float().mean() > 0.9
    assert other.weights_TK.isfinite().all()


def test_it_balances_a_skewed_batch_in_few_iterations() -> None:
    # On such logits the reference counts 6 iterations.
    logits_TE = normal(4096, 16) + 1.5 * normal(16, seed=1)
    routing = of_logits(SinkhornConfig(top_k=1), 16)(logits_TE, make_context())
    counts_E = torch.bincount(routing.expert_ids_TK.flatten(), minlength=16).double()
    assert counts_E.std() / counts_E.mean() < 0.1
    assert 4 <= routing.metrics["sinkhorn_iterations"].item() <= 9
    assert 0 < routing.metrics["choice_agreement"].item() < 0.9


@pytest.mark.parametrize("K", [1, 2])
def test_gradient_reaches_the_router_by_the_raw_scores_alone(K: int) -> None:
    router = of_logits(SinkhornConfig(top_k=K), 4)
    x_TE, upstream_TK = normal(9, 4).requires_grad_(), normal(9, K, seed=2)
    routing = router(x_TE, make_context())
    (found_TE,) = torch.autograd.grad((routing.weights_TK * upstream_TK).sum(), x_TE)

    def by_scores(logits_TE: Tensor) -> Tensor:
        dense_TE = logits_TE.sigmoid() if K == 1 else logits_TE.softmax(-1)
        return (dense_TE.gather(1, routing.expert_ids_TK) * upstream_TK).sum()

    (expected_TE,) = torch.autograd.grad(by_scores(x_TE), x_TE)
    torch.testing.assert_close(found_TE, expected_TE)
    if K == 1:  # a sigmoid of one expert tells the others nothing
        assert (found_TE != 0).sum() == 9
