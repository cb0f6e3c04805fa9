"""Memory of a rank against arithmetic by hand, and which way it goes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moe.accounting.memory import ElementBytes
from moe.accounting.params import count_from_shape
from moe.accounting.shape import shape_from_config
from moe.planning.blocks import model_of
from moe.planning.layout import Job, Layout
from moe.planning.layout_memory import Memory, in_flight
from moe.planning.plan_layouts import make_plan
from moe.planning.published import CONFIGS
from tests.moe.planning.jobs import BARE, small_cluster, small_job


def memory(layout: Layout, job: Job | None = None, gpus: int = 4, **sizes: int) -> Memory:
    """Of the fullest rank of the small job."""
    return make_plan(layout, job or small_job(), small_cluster(gpus), BARE, ElementBytes(**sizes)).memory


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_hold_every_parameter_of_the_model_once(name: str) -> None:
    shape = replace(shape_from_config(CONFIGS[name]), next_token_layers=0)
    model = model_of(shape, 4096)
    total = sum(model.kinds[kind].parameters + model.kinds[kind].expert_parameters for kind in model.order)
    assert total == count_from_shape(shape).total
    assert len(model.order) == len(shape.layers) + 2


def test_replicas_with_spread_experts_by_hand() -> None:
    # Attention 2*8*8 + 2*8*4 = 192, two norms 16, router 4*8 = 32: 240 a layer. Embedding 256, head 256 and
    # its norm 8. Together 480 + 520 = 1000. Experts 4 * 3*8*16 = 1536 a layer, half of them on a rank.
    dense, routed = 1000, 2 * 1536 // 2
    found = memory(Layout(expert=2))
    assert found.weights == 2 * (dense + routed)
    assert found.gradients == 4 * (dense + routed)
    # 4 ranks share what is not expert; experts are on 2 of them each: 250 + 768 elements of 4 + 8 bytes.
    assert found.optimizer == 12 * (dense / 4 + routed / 2)
    # A token in a layer. 16 bits: two norms' inputs 16, queries, keys, values and output 8 + 4 + 4 + 8 = 24.
    # Operands: two norms' outputs 16, attention's output 8. Each of 2 experts: gate and up 32; its input and
    # the activation 8 + 16. In bytes 2*40 + 2*24 + 2*2*(32 + 24) = 352; the head 2*(8 + 8) = 32.
    assert found.activations == 4 * (2 * 352 + 32)
    # Logits 32 of 6 bytes; 2 rows of 8 channels of 2 bytes, there and back.
    assert found.buffers == 4 * (32 * 6 + 2 * 8 * 2 * 2)


def test_recomputation_by_hand() -> None:
    # Selective drops norms' outputs (16) and the experts' activation (16 of each of 2 rows): 96 bytes.
    selective = memory(Layout(expert=2, recompute="selective"))
    assert selective.activations == 4 * (2 * (352 - 96) + 32)
    # Full keeps the 8 channels between layers, and one layer while it is computed once more.
    full = memory(Layout(expert=2, recompute="full"))
    assert full.activations == 4 * (2 * 16 + 16 + 352)


def test_eight_bits_by_hand() -> None:
    # Operands take one byte instead of two: 24 a layer and 24 a row fewer; 8 fewer in the head.
    found = memory(Layout(expert=2), small_job(precision="fp8"))
    assert found.activations == 4 * (2 * (352 - 24 - 2 * 24) + 32 - 8)
    assert found.weights == 2 * (1000 + 1536)


def test_full_sharding_by_hand() -> None:
    found = memory(Layout(expert=2, sharding="full"))
    cut = 1000 / 4 + 1536 / 2
    assert (found.weights, found.gradients, found.optimizer) == (2 * cut, 4 * cut, 12 * cut)
    # The layer at work and the next are there whole: 240 + 768 elements, weights and gradients.
    assert found.buffers == memory(Layout(expert=2)).buffers + 2 * (240 + 768) * (2 + 4)
    assert memory(Layout(expert=2, sharding="none")).optimizer == 12 * (1000 + 1536)


def test_stages_by_hand() -> None:
    # Two stages of one layer each; with them go the embedding and the head, 264 with its norm.
    found = memory(Layout(expert=2, pipeline=2))
    # The first stage keeps two micro-batches, 2 * 4 * 352 bytes, the last one, 4 * (352 + 32), and logits.
    assert found.weights == 2 * (240 + 256 + 768)
    assert found.activations == 2 * 4 * 352
    assert found.optimizer == 12 * ((240 + 256) / 2 + 768 / 1)


@pytest.mark.parametrize(
    ("layout", "stage", "parts"),
    [
        (Layout(), 0, 1),
        (Layout(pipeline=4), 0, 4),
        (Layout(pipeline=4), 3, 1),
        (Layout(pipeline=4, overlap=True), 0, 5),
        # ((2 - 1) * 4 + 2 * 3 + 1) / 2
        (Layout(pipeline=4, chunks=2), 0, 5.5),
        (Layout(pipeline=4, chunks=2), 3, 2.5),
    ],
)
def test_micro_batches_under_way(layout: Layout, stage: int, parts: float) -> None:
    assert in_flight(layout, stage, accumulation=16) == parts
    assert in_flight(layout, stage, accumulation=1) == 1


LESS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"micro_batch": 1}, {"micro_batch": 2}, "activations"),
    ({"recompute": "selective"}, {}, "activations"),
    ({"recompute": "full"}, {"recompute": "selective"}, "activations"),
    ({"tensor": 2}, {}, "weights"),
    ({"tensor": 2}, {}, "activations"),
    ({"expert": 4}, {"expert": 2}, "gradients"),
    ({"pipeline": 2}, {}, "weights"),
    ({"sharding": "full"}, {}, "gradients"),
    ({"sharding": "optimizer"}, {"sharding": "none"}, "optimizer"),
    ({"offloaded": 1}, {}, "activations"),
]


@pytest.mark.parametrize(("less", "more", "part"), LESS, ids=[f"{low}<{high}" for low, high, _ in LESS])
def test_what_needs_less(less: dict[str, Any], more: dict[str, Any], part: str) -> None:
    shape = shape_from_config({**CONFIGS["Qwen3-30B-A3B"]})
    job = Job(shape, 4096, 512)
    few, many = (memory(Layout(**{"expert": 2, **layout}), job, 16) for layout in (less, more))
    assert getattr(few, part) < getattr(many, part)


def test_more_gpus_never_need_more_memory_of_one() -> None:
    job = Job(shape_from_config(CONFIGS["Qwen3-30B-A3B"]), 4096, 512)
    totals = [memory(Layout(expert=8), job, gpus).total for gpus in (8, 16, 32, 64)]
    assert totals == sorted(totals, reverse=True) and totals[0] > totals[-1]
