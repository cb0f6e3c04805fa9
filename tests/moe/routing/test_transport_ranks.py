"""Two ranks equal one: Sinkhorn's potentials and their gradient, and every router that uses them.

Letters: T tokens, D model width, E experts, K experts a token.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from moe.routers.configs.s_base_config import SBaseConfig
from moe.routers.configs.sinkhorn_config import SinkhornConfig
from moe.routers.configs.ssr_config import SSRConfig
from moe.routing.sinkhorn_rule import SinkhornRule
from moe.routing.transport import sinkhorn
from tests.distributed_helper import run_ranks
from tests.moe.routers.routing_cases import label, make_context, make_router
from tests.moe.routing.test_transport import normal

T, D, E = 24, 6, 4
SSR = SSRConfig(probability=1.0, cost="linear", xi=0.5)
CONFIGS = [
    SSR,
    dataclasses.replace(SSR, gradient="unrolled"),
    dataclasses.replace(SSR, transport_noise=0.5, check_every=3),
    SSRConfig(gate_noise=1.0),
    SinkhornConfig(),
    SinkhornConfig(top_k=1),
    SBaseConfig(),
]


def _work(rank: int, ranks: int) -> dict[str, Any]:
    """This rank's half of the tokens; gradients of the sum over its tokens."""
    group = torch.distributed.group.WORLD if ranks > 1 else None
    share = slice(rank * T // ranks, (rank + 1) * T // ranks)
    results: dict[str, Any] = {}
    kernel_TE = (3 * normal(T, E)).requires_grad_()
    for rows_last in (True, False):
        rule = SinkhornRule(30, 1e-6, rows_last=rows_last, check_every=4)
        # Padding is uneven: one rank has six tokens less than the other, where there are two.
        mask_T = (torch.arange(T) > 5)[share]
        found = sinkhorn(kernel_TE[share], rule, mask_T=mask_T, group=group)
        weights_E = torch.arange(E).double()
        (grad_TE,) = torch.autograd.grad((found.column_E * weights_E).sum() / ranks, kernel_TE)
        results[f"potentials {rows_last}"] = (found.column_E.detach(), found.iterations, found.residual)
        results[f"rows {rows_last}"] = found.row_T.detach()
        results[f"grad {rows_last}"] = grad_TE
    x_TD, upstream_TK = normal(T, D, seed=1), normal(T, 2, seed=2)
    for config in CONFIGS:
        router = make_router(config, D, E).double()
        routing = router(x_TD[share], make_context(step=1, group=group))
        (routing.weights_TK * upstream_TK[share, : router.top_k]).sum().backward()
        results[label(config)] = (routing.expert_ids_TK, routing.weights_TK.detach(), router.weight_ED.grad)
    return results


@pytest.mark.distributed
def test_two_ranks_equal_one() -> None:
    one, two = _work(0, 1), run_ranks(_work, 2)
    for rows_last in (True, False):
        for value, *found in zip(*(r[f"potentials {rows_last}"] for r in (one, *two)), strict=True):
            assert torch.equal(found[0], found[1]), "the ranks must agree to the last bit, or one stops alone"
            torch.testing.assert_close(found[0], value, rtol=1e-9, atol=1e-9)
        rows_T = torch.cat([result[f"rows {rows_last}"] for result in two])
        torch.testing.assert_close(rows_T, one[f"rows {rows_last}"], rtol=1e-9, atol=1e-9)
        grads_TE = two[0][f"grad {rows_last}"] + two[1][f"grad {rows_last}"]
        torch.testing.assert_close(grads_TE, one[f"grad {rows_last}"], rtol=1e-9, atol=1e-9)
    for config in CONFIGS:
        ids_TK, weights_TK, grad_ED = one[label(config)]
        assert torch.equal(torch.cat([result[label(config)][0] for result in two]), ids_TK), label(config)
        joined_TK = torch.cat([result[label(config)][1] for result in two])
        torch.testing.assert_close(joined_TK, weights_TK, rtol=1e-9, atol=1e-12)
        summed_ED = two[0][label(config)][2] + two[1][label(config)][2]
        torch.testing.assert_close(summed_ED, grad_ED, rtol=1e-8, atol=1e-10)
