"""Time of a step against arithmetic by hand, and which way it goes."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product
from typing import Any

import pytest

from moe.accounting.flops import flops_from_shape
from moe.accounting.shape import shape_from_config
from moe.planning.assumptions import Assumptions
from moe.planning.cluster import GPUS, Cluster
from moe.planning.layout import Job, Layout
from moe.planning.pipeline_stages import cut_evenly
from moe.planning.plan_layouts import make_plan
from moe.planning.published import CONFIGS
from moe.planning.time import StepTime, exchange_rows, ranks_nearby
from tests.moe.planning.jobs import BARE, SMALL, small_cluster, small_job


def seconds(layout: Layout, assumed: Assumptions = BARE, job: Job | None = None, gpus: int = 4) -> StepTime:
    """Of a step of the small job."""
    return make_plan(layout, job or small_job(), small_cluster(gpus), assumed).time


def test_products_by_hand() -> None:
    # heads of 128 channels, so that products and not exponentials bound attention
    wide = {**SMALL, "hidden_size": 256, "head_dim": 128}
    job = small_job(shape=shape_from_config(wide))
    flops = flops_from_shape(job.shape, 4)
    # Attention's backward is 2.5 forwards and not 2: half a forward's scores more. 2*2*2*128 a key, 2.5 keys.
    scores = 2 * (2 * 2 * 2 * 128) * 2.5
    expected = 32 * (flops.training + 0.5 * scores) / 4 / 989e12
    assert seconds(Layout(), job=job).products == pytest.approx(expected, rel=1e-12)
    # Everything but the head (256 * 32, which is kept) once more; of attention 3.5 forwards become 4.5.
    again = 32 * (flops.forward - 2 * 256 * 32) / 4 / 989e12
    full = seconds(Layout(recompute="full"), job=job).products
    assert full == pytest.approx(expected + again, rel=1e-12)


def test_narrow_heads_take_the_time_of_full_ones() -> None:
    job, cluster = small_job(), small_cluster()
    plain = 32 * 3 * flops_from_shape(job.shape, 4).forward / 4
    # 2 heads of 4 channels, twice, count as 2 * 256; 2.5 keys of 2 FLOPs, 3.5 forwards, 2 layers
    scores = 32 / 4 * 2 * 2 * 2.5 * (2 * 256 * 3.5 - 2 * 2 * 4 * 3)
    assert seconds(Layout()).products == pytest.approx((plain + scores) / cluster.gpu.bf16, rel=1e-12)


def test_few_rows_of_an_expert_cost_more() -> None:
    # A micro-batch of 4 tokens on each of 2 ranks makes 4 * 2 * 2 / 4 = 4 rows an expert, one of 8 makes 8.
    half = replace(BARE, rows_half=4.0)
    one, two = (seconds(Layout(expert=2, micro_batch=size), half).products for size in (1, 2))
    bare = seconds(Layout(expert=2)).products
    assert bare < two < one < 2 * bare + 1e-30


def test_exchange_by_hand() -> None:
    # Of 2 ranks with 2 experts each, a token with 2 of 4 uses a given one unless both are on the other:
    # 1 - 1/6. 16 bytes a row, 4 tokens, there and back, and again for gradients; 2 layers, 2 micro-batches.
    cluster = small_cluster()
    expected = 2 * 2 * 4 * (5 / 6 * 16 * 4) / cluster.gpu.nvlink
    assert seconds(Layout(expert=2)).exchange == pytest.approx(expected, rel=1e-12)
    assert seconds(Layout(expert=2, overlap=True)).exchange == pytest.approx(expected / 2, rel=1e-12)
    again = seconds(Layout(expert=2, recompute="full")).exchange
    assert again == pytest.approx(1.5 * expected, rel=1e-12)
    assert seconds(Layout()).exchange == 0


@pytest.mark.parametrize(("experts", "top_k", "ranks", "near"), [(8, 2, 4, 2), (8, 3, 8, 4), (6, 2, 3, 3)])
def test_rows_of_the_exchange_equal_a_count_of_all_choices(
    experts: int, top_k: int, ranks: int, near: int
) -> None:
    within = beyond = 0.0
    choices = list(combinations(range(experts), top_k))
    for choice, source in product(choices, range(ranks)):
        wanted = {expert * ranks // experts for expert in choice}
        for domain in range(ranks // near):
            there = [rank for rank in wanted if rank // near == domain]
            if domain == source // near:
                within += len([rank for rank in there if rank != source])
            elif there:
                beyond += 1
                # It arrives at the rank that has the source's place, and goes on to the others.
                within += len([rank for rank in there if rank % near != source % near])
    count = len(choices) * ranks
    assert exchange_rows(experts, top_k, ranks, near) == pytest.approx((within / count, beyond / count))


def test_neighbours_share_domains_evenly() -> None:
    assert [ranks_nearby(ranks, 8) for ranks in (1, 6, 8, 12, 16, 64)] == [1, 6, 8, 6, 8, 8]
    assert ranks_nearby(64, 72) == 64


def test_tensor_and_stages_by_hand() -> None:
    nvlink, network = small_cluster().gpu.nvlink, small_cluster().gpu.network
    # Two ranks share a sequence's 4 tokens, 2 each. Forward gathers or scatters embedding and head once, each
    # layer twice: 6 times; backward as often and half again. 2 tokens of 16 bytes; 4 micro-batches.
    expected = 4 * 6 * 2.5 * (2 * 16) / nvlink
    assert seconds(Layout(tensor=2)).tensor == pytest.approx(expected, rel=1e-12)
    # 4 micro-batches of 4 tokens of 16 bytes, activations there and gradients back, between two domains.
    expected = 4 * 2 * (4 * 16) / network
    assert seconds(Layout(pipeline=2)).pipeline == pytest.approx(expected, rel=1e-12)


def test_a_bubble_by_hand() -> None:
    # With P stages and M micro-batches (P - 1) / M of the work is waited for, with V turns a V-th of that.
    shape = shape_from_config({**CONFIGS["Llama-3-8B"], "num_hidden_layers": 30})
    job = Job(shape, 4096, 64)
    cluster = Cluster(GPUS["h100"], 4)
    plain, turns = (
        make_plan(Layout(pipeline=4, chunks=chunks), job, cluster, BARE).time for chunks in (1, 2)
    )
    for found, chunks in ((plain, 1), (turns, 2)):
        work = found.products + found.memory
        assert found.bubble == pytest.approx(work * 3 / 64 / chunks, rel=1e-12)


def test_data_by_hand() -> None:
    # Gradients cut and weights gathered, (P - 1) / P of 4 + 2 bytes an element: 1000 over 4 ranks, whose
    # rings have 2 members in a domain, and 1536 of experts over 2 ranks in different domains.
    network = small_cluster().gpu.network
    expected = 6 * (1000 * 3 / 4 / (2 * network) + 1536 / 2 / network)
    assert seconds(Layout(expert=2)).data == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("costs", "parts"), [((1, 1, 1, 1), 2), ((3, 1, 1, 1, 5, 2), 3), ((1, 9, 1, 1), 3), ((2, 2), 2)]
)
def test_stages_are_cut_as_evenly_as_can_be(costs: tuple[int, ...], parts: int) -> None:
    cut = cut_evenly(costs, parts)
    assert [item for part in cut for item in part] == list(range(len(costs)))
    assert len(cut) == parts and all(cut)

    def dearest(stops: tuple[int, ...]) -> int:
        ends = [0, *stops, len(costs)]
        return max(sum(costs[a:b]) for a, b in zip(ends, ends[1:], strict=False))

    best = min(dearest(stops) for stops in combinations(range(1, len(costs)), parts - 1))
    assert max(sum(costs[item] for item in part) for part in cut) == best


SLOWER: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"recompute": "selective"}),
    ({"recompute": "selective"}, {"recompute": "full"}),
    ({"overlap": True}, {}),
    ({"graphed": True}, {}),
    ({"pipeline": 2, "chunks": 2}, {"pipeline": 2}),
]


@pytest.mark.parametrize(("fast", "slow"), SLOWER, ids=[f"{a}<{b}" for a, b in SLOWER])
def test_what_is_slower(fast: dict[str, Any], slow: dict[str, Any]) -> None:
    job, cluster = Job(shape_from_config(CONFIGS["Qwen3-30B-A3B"]), 4096, 512), Cluster(GPUS["h100"], 16)
    quick, late = (make_plan(Layout(**{"expert": 8, **one}), job, cluster).time for one in (fast, slow))
    assert quick.total < late.total


@pytest.mark.parametrize(
    ("name", "factor"),
    [("nvlink", 0.5), ("network", 0.5), ("memory_bandwidth", 0.5), ("bf16", 0.5), ("domain", 4)],
)
def test_a_slower_cluster_is_slower(name: str, factor: float) -> None:
    job, gpu = Job(shape_from_config(CONFIGS["Qwen3-30B-A3B"]), 4096, 512), GPUS["h100"]
    value = factor if name == "domain" else getattr(gpu, name) * factor
    slow = replace(gpu, **{name: value})
    layout = Layout(tensor=2, pipeline=2, expert=8)
    times = [make_plan(layout, job, Cluster(one, 32)).time.total for one in (gpu, slow)]
    assert times[0] < times[1]


def test_uneven_routing_costs_time_and_memory() -> None:
    job, cluster = Job(shape_from_config(CONFIGS["Qwen3-30B-A3B"]), 4096, 512), Cluster(GPUS["h100"], 16)
    even, uneven = (
        make_plan(Layout(expert=8), job, cluster, Assumptions(imbalance=value)) for value in (1, 1.3)
    )
    assert even.time.products < uneven.time.products and even.time.exchange < uneven.time.exchange
    assert even.memory.activations < uneven.memory.activations
