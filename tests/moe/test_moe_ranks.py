"""Two ranks equal one: load, balance losses with their gradients, and statistics.

Letters: T tokens, D model width, E experts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe.metrics import LayerStats, LoadReport, report_load
from moe.routers.configs.topk_config import TopKConfig
from moe.routing.balance import count_load, switch_loss, z_loss
from moe.types import Routing
from tests.distributed_helper import run_ranks
from tests.moe.routers.routing_cases import make_context, make_router

T, D, E = 12, 6, 4


def _work(rank: int, ranks: int) -> dict[str, Any]:
    """This rank's share of the tokens; the gradient that data parallelism would average."""
    group = torch.distributed.group.WORLD if ranks > 1 else None
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(0))
    # Padding is uneven: rank 0 of two has four real tokens of six, rank 1 has all.
    mask_T = torch.arange(T) > 1
    share = slice(rank * T // ranks, (rank + 1) * T // ranks)
    router = make_router(TopKConfig(balance_coef=1.0, z_coef=1.0), D, E)
    context = make_context(group=group, padding_mask=mask_T[share])
    routing = router(x_TD[share], context)
    sum(routing.losses.values()).backward()
    stats = LayerStats()
    stats.record(0, routing, mask_T[share])
    stats.record(1, routing, mask_T[share])
    load = count_load(routing.expert_ids_TK, E, mask_T[share], group)
    assert routing.scores_TE is not None and routing.logits_TE is not None
    return {
        "counts": load.counts_E.tolist(),
        "tokens_per_rank": load.tokens_per_rank.item(),
        "losses": [
            switch_loss(load, routing.scores_TE, mask_T[share]).item(),
            z_loss(routing.logits_TE, load.tokens_per_rank, mask_T[share]).item(),
        ],
        "grad": router.weight_ED.grad,
        "report": report_load([(2, stats)], group),
    }


@pytest.mark.distributed
def test_two_ranks_equal_one() -> None:
    one, two = _work(0, 1), run_ranks(_work, 2)
    assert [result["counts"] for result in two] == [one["counts"]] * 2
    # Ten real tokens: five a rank, though rank 0 has four and rank 1 six.
    assert (one["tokens_per_rank"], two[0]["tokens_per_rank"]) == (10, 5)
    means = [sum(values) / 2 for values in zip(*(result["losses"] for result in two), strict=True)]
    assert means == pytest.approx(one["losses"], rel=1e-6)
    torch.testing.assert_close((two[0]["grad"] + two[1]["grad"]) / 2, one["grad"], rtol=1e-5, atol=1e-7)
    assert two[0]["report"] == two[1]["report"]
    _assert_same_report(two[0]["report"], one["report"])


# Experts with a token by rank and micro-batch.
_USED = {0: ([0, 1], [3]), 1: ([1, 2], [3])}


def _spread(rank: int, ranks: int) -> LoadReport:
    """Ranks 0 and 1 hold two experts each."""
    stats = LayerStats(readers=torch.distributed.group.WORLD)
    for micro_batch, experts in enumerate(_USED[rank]):
        ids_TK = torch.tensor(experts)[:, None]
        stats.record(micro_batch, Routing(ids_TK, torch.ones(ids_TK.shape), E), None)
    report = report_load([(0, stats)], torch.distributed.group.WORLD)
    assert report is not None
    return report


@pytest.mark.distributed
def test_experts_of_several_ranks_are_read_once() -> None:
    for report in run_ranks(_spread, 2):
        # First {0, 1, 2}, of which rank 0 reads two, then {3}; all four in the step, two on each rank.
        assert report.distinct == (2.0,) and report.busiest == (1.5,)
        assert report.distinct_in_step == (4.0,) and report.busiest_in_step == (2.0,)


def _assert_same_report(found: LoadReport, expected: LoadReport) -> None:
    assert found.layers == expected.layers == (2,)
    assert found.load[0] == pytest.approx(expected.load[0])
    assert set(found.per_layer) == set(expected.per_layer) >= {"balance_loss", "z_loss", "maxvio"}
    for name, values in expected.per_layer.items():
        assert found.per_layer[name] == pytest.approx(values, rel=1e-6), name
