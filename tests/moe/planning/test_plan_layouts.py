"""Which layouts there are, and what is said when none fits."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import pytest

from moe.accounting.memory import ElementBytes
from moe.accounting.shape import shape_from_config
from moe.errors import ConfigError
from moe.planning.advice import no_fit_error
from moe.planning.assumptions import Assumptions, with_settings
from moe.planning.cluster import GPUS, Cluster
from moe.planning.layout import Job, Layout, divisors, enumerate_layouts, layout_mistakes
from moe.planning.plan_layouts import fastest, make_plan
from moe.planning.published import CONFIGS
from tests.moe.planning.jobs import small_cluster, small_job


def test_every_layout_of_a_small_job() -> None:
    job, cluster = small_job(), small_cluster()
    found = list(enumerate_layouts(job, cluster, recompute=("none",), micro_batches=(1, 2)))
    expected = set()
    # By the rules, worked out apart: 4 GPUs, a domain of 2, 2 layers in 4 blocks, 4 experts, 8 sequences.
    for tensor, pipeline, chunks, expert, micro in product((1, 2), (1, 2), (1, 2), (1, 2, 4), (1, 2)):
        data = 4 // (tensor * pipeline)
        batches = 8 // (data * micro)
        turns = chunks == 1 or (pipeline == 2 and batches % 2 == 0)
        if turns and (4 // pipeline) % expert == 0 and 8 % (data * micro) == 0:
            kinds = ("optimizer", "full") if pipeline == 1 else ("optimizer",)
            expected |= {(tensor, pipeline, chunks, expert, micro, kind) for kind in kinds}
    seen = {
        (one.tensor, one.pipeline, one.chunks, one.expert, one.micro_batch, one.sharding) for one in found
    }
    assert seen == expected and len(found) == len(expected)
    assert all(one.context == 1 for one in found)


def test_long_sequences_are_cut_over_ranks() -> None:
    job = Job(shape_from_config(CONFIGS["Llama-3-8B"]), 32768, 64)
    contexts = {one.context for one in enumerate_layouts(job, Cluster(GPUS["h100"], 8))}
    assert contexts == {1, 2, 4, 8}
    plans = [make_plan(Layout(context=cut), job, Cluster(GPUS["h100"], 8)) for cut in (1, 2)]
    assert plans[1].memory.activations == plans[0].memory.activations / 2
    assert plans[1].time.tensor > plans[0].time.tensor == 0


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (Layout(tensor=3), "4 GPUs do not divide by TP x CP x PP = 3"),
        (Layout(expert=3), "4 experts do not divide by it"),
        (Layout(expert=4, pipeline=2), "the 2 GPUs of a stage do not divide by it"),
        (Layout(micro_batch=16), "do not divide 8 sequences"),
        (Layout(pipeline=4, chunks=2), "there are only 4 parts"),
        (Layout(chunks=2), "a single stage has no turns"),
        (Layout(pipeline=2, chunks=2, micro_batch=4), "a multiple of PP micro-batches"),
        (Layout(pipeline=2, sharding="full"), "cannot be combined with stages"),
        (Layout(tensor=4), "heads do not divide by it"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(layout: Layout, said: str) -> None:
    mistakes = layout_mistakes(layout, small_job(), small_cluster())
    assert any(said in mistake.rule for mistake in mistakes), [str(one) for one in mistakes]


def test_the_fastest_that_fit_come_first() -> None:
    job, cluster = Job(shape_from_config(CONFIGS["Qwen3-30B-A3B"]), 4096, 64), Cluster(GPUS["h100"], 16)
    plans = [make_plan(one, job, cluster) for one in enumerate_layouts(job, cluster, ("none", "full"), (1,))]
    best = fastest(plans)
    assert 0 < len(best) < len(plans) and all(plan.memory.total <= cluster.gpu.memory for plan in best)
    assert [plan.time.total for plan in best] == sorted(plan.time.total for plan in best)


def test_when_nothing_fits_the_remedies_are_true() -> None:
    job, cluster = Job(shape_from_config(CONFIGS["Qwen3-30B-A3B"]), 4096, 64), Cluster(GPUS["h100"], 4)
    sizes = ElementBytes()
    error = no_fit_error(job, cluster, Assumptions(), sizes).mistakes[0]
    assert "no layout fits in 80.0 GiB a GPU" in error.rule and "too many (weights" in error.rule
    assert "--gpus 8" in error.remedy and "--gpu h200" in error.remedy

    def fits(cluster: Cluster, sizes: ElementBytes) -> bool:
        layouts = enumerate_layouts(job, cluster, ("full",), (1,))
        return any(make_plan(one, job, cluster, sizes=sizes).fits for one in layouts)

    assert not fits(cluster, sizes)
    assert fits(Cluster(GPUS["h100"], 8), sizes) and fits(Cluster(GPUS["h200"], 4), sizes)
    assert ("--optimizer-bytes 4" in error.remedy) == fits(cluster, ElementBytes(gradients=2, optimizer=4))


def test_a_job_without_any_layout_says_so() -> None:
    # Two layers and a domain of two leave 16 replicas at least.
    job, cluster = small_job(global_batch=7), small_cluster(64)
    error = no_fit_error(job, cluster, Assumptions(), ElementBytes())
    assert "7 sequences cannot be laid out over 64 GPUs" in str(error)


def test_settings_of_parameters() -> None:
    assert with_settings(Assumptions(), ["traffic=3", "links=0.5"]) == replace(
        Assumptions(), traffic=3.0, links=0.5
    )
    with pytest.raises(ConfigError) as caught:
        with_settings(Assumptions(), ["speed=1", "traffic=fast", "links=0", "traffic=-1"])
    rules = [mistake.rule for mistake in caught.value.mistakes]
    assert len(rules) == 4 and "it is no parameter of the model" in rules[0]


def test_gpus_are_of_the_table_of_peaks() -> None:
    assert GPUS["gb200"].peak("bf16") == 2500e12 and GPUS["gb200"].peak("nvfp4") == 10000e12
    for name, gpu in GPUS.items():
        # narrower products are at least twice as many, and never as many as sparse sheets say
        for bits, rate in gpu.low.items():
            assert 2 <= rate / gpu.bf16 <= 16 / bits * 1.5 + 1e-9, name
    with pytest.raises(ConfigError, match="no units for products of 8 bits"):
        GPUS["a100"].peak("fp8")


def test_bandwidth_of_groups() -> None:
    cluster = Cluster(GPUS["h100"], 64)
    assert cluster.bandwidth(8, 1) == cluster.gpu.nvlink
    # Every second rank: 4 members a node, 4 rings side by side. Every eighth: one.
    assert cluster.bandwidth(8, 2) == 4 * cluster.gpu.network
    assert cluster.bandwidth(8, 8) == cluster.gpu.network
    assert cluster.bandwidth(64, 1) == 8 * cluster.gpu.network
    assert divisors(12, 4) == [1, 2, 3, 4]


def test_a_layout_is_json() -> None:
    assert json.loads(json.dumps(vars(Layout())))["expert"] == 1
