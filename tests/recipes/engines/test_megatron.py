"""Megatron equals the native engine on one rank: losses, gradients by name, norms, load, checkpoints.

The bounds are those of `test_native_ranks`: the order of fp32 sums is all that differs.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from recipes.engines.megatron.cpu_patches import PATCHES
from tests.recipes.engines import megatron_cases
from tests.recipes.engines.megatron_case_list import CASES, FAMILIES, READS, SAME, TRAINED, Layout
from tests.recipes.engines.megatron_cases import NATIVE, Found
from tests.recipes.engines.megatron_probes import PROBES
from tests.recipes.engines.test_native_ranks import (
    ADAPTED,
    SUMS,
    check_gradients,
    check_series,
    check_weights,
    relative,
)

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
_ADAPTS = ("rich", "norms", "half")
# Of logits: a sum over 32 features, two layers and the vocabulary, far below what a wrong weight would do.
LOGITS = 1e-5
# What 25 steps of SGD make of the order of sums.
LONG = 1e-5


@pytest.fixture(scope="module")
def found() -> dict[int, list[Found]]:
    """By number of ranks, of every rank."""
    return megatron_cases.found()


@pytest.mark.parametrize(
    ("layout", "name"),
    [(layout, name) for layout, names in TRAINED.items() for name in names if "bf16" not in name],
)
def test_it_trains_as_the_native_engine_on_one_rank(
    layout: Layout, name: str, found: dict[int, list[Found]]
) -> None:
    native = found[1][0].trained[NATIVE][SAME.get(name, name)]
    ours = found[layout[0]][0].trained[layout][name]
    adapts, long = SAME.get(name, name) in _ADAPTS, name == "long"
    check_series(native, ours, ADAPTED if adapts else LONG if long else SUMS)
    check_weights(native, ours, 10 * ADAPTED if adapts else 10 * LONG if long else SUMS)
    assert ours.notes == native.notes == {"updates": [CASES[name].steps] * len(native.notes["updates"])}
    native_grads = {key: grad for key, grad in native.grads.items() if key in ours.grads}
    check_gradients(replace(native, grads=native_grads), ours, SUMS)


@pytest.mark.parametrize(
    ("layout", "name"),
    [(layout, name) for layout, names in TRAINED.items() for name in names if "bf16" in name],
)
def test_bf16_is_as_near_to_fp32_as_on_the_native_engine(
    layout: Layout, name: str, found: dict[int, list[Found]]
) -> None:
    exact, native = (found[1][0].trained[NATIVE][case] for case in ("fp32", "bf16"))
    ours = found[layout[0]][0].trained[layout][name]
    # Megatron's own experts round twice more: weighted rows, and the sum over the slots.
    times = 2 if CASES[name].engine.get("experts", "graft") != "graft" else 1
    for figure in ("loss", "grad_norm", "val_loss"):
        want = torch.tensor(exact.series(figure))
        allowed = times * max(2 * relative(torch.tensor(native.series(figure)), want), 2.0**-8)
        assert relative(torch.tensor(ours.series(figure)), want) <= allowed, figure
    for key, weight in exact.weights.items():
        assert ours.weights[key].dtype == torch.float32, key
        allowed = times * 2 * float((native.weights[key] - weight).norm() / weight.norm())
        assert 0 < float((ours.weights[key] - weight).norm() / weight.norm()) <= allowed, key


def test_gradients_were_compared_in_every_layout(found: dict[int, list[Found]]) -> None:
    for layout in TRAINED:
        native = found[1][0].trained[NATIVE]
        compared = [
            case.grads.keys() == native[SAME.get(name, name)].grads.keys()
            for name, case in found[layout[0]][0].trained[layout].items()
        ]
        assert any(compared), layout


def test_all_ranks_report_the_same(found: dict[int, list[Found]]) -> None:
    for layout, names in TRAINED.items():
        first, *others = [rank.trained[layout] for rank in found[layout[0]]]
        for name in names:
            for other in others:
                assert other[name].series("grad_norm") == first[name].series("grad_norm"), (layout, name)
                assert other[name].loads == first[name].loads, (layout, name)
                weights = other[name].weights
                assert all(torch.equal(weights[key], w) for key, w in first[name].weights.items()), name


@pytest.mark.parametrize("whose", ["none", "graft", "megatron"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_it_computes_what_the_host_computes(
    world_size: int, family: str, whose: str, found: dict[int, list[Found]]
) -> None:
    for rank in found[world_size]:
        drift, returned = rank.compared(family, whose)
        assert drift < LOGITS and returned == []


def test_stages_compute_what_the_host_computes(found: dict[int, list[Found]]) -> None:
    for rank in found[2]:
        drift, returned = rank.compared("qwen2", "stages")
        assert drift < LOGITS and returned == []


def test_experts_of_transformer_engine_have_the_weights_of_the_host(found: dict[int, list[Found]]) -> None:
    """Over a stand-in for its grouped product; see `megatron_stand_ins`."""
    for rank in found[2]:
        drift, returned = rank.compared("qwen3", "te")
        assert drift < LOGITS and returned == []
        # A checkpoint of theirs is one of ours.
        theirs, ours = rank.crossed
        assert {name: relative(ours[name], w) for name, w in theirs.items() if not torch.equal(ours[name], w)}
        assert max(relative(ours[name], weight) for name, weight in theirs.items()) < SUMS


def test_stand_ins_stand_below_what_is_megatrons_own(found: dict[int, list[Found]]) -> None:
    grouped = ["TEGroupedMLP", "TEColumnParallelGroupedLinear"]
    assert found[2][0].built == {
        "te": [*grouped, "MoEAlltoAllTokenDispatcher", "NoneType"],
        "deepep": ["ExpertsSlot", "NoneType", "MoEFlexTokenDispatcher", "_DeepepManager"],
        "hybridep_te": [*grouped, "MoEFlexTokenDispatcher", "_HybridEPManager"],
    }


def test_ranks_leave_together_but_in_trouble(found: dict[int, list[Found]]) -> None:
    # Groups are closed when all have come: nobody is in them any more.
    assert [rank.left for rank in found[2]] == [True, True]
    # Who has failed may be the only one who comes.
    assert [rank.given_up for rank in found[2]] == [True, True]


@pytest.mark.parametrize(
    ("source", "layout"), [(source, layout) for source, layouts in READS.items() for layout in layouts]
)
def test_a_checkpoint_is_read_by_another_layout_and_engine(
    source: Layout, layout: Layout, found: dict[int, list[Found]]
) -> None:
    # The step behind the checkpoint, moments included, is what the writer itself did next.
    wanted = found[source[0]][0].written[source]
    weights = found[layout[0]][0].read[source, layout]
    assert weights.keys() == wanted.keys()
    wrong = {name: relative(weights[name], weight) for name, weight in wanted.items()}
    assert {name: error for name, error in wrong.items() if error > ADAPTED} == {}


def test_a_gradient_that_is_not_finite_on_one_rank_updates_none(found: dict[int, list[Found]]) -> None:
    for rank in found[2]:
        assert set(rank.refused.values()) == {True}, rank.refused


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU nothing fails without a patch")
def test_every_patch_for_cpus_is_needed_and_all_are_enough(found: dict[int, list[Found]]) -> None:
    # Something that works without its patch asks for the patch to be deleted.
    assert PROBES.keys() == PATCHES.keys()
    for rank in found[2]:
        probed = rank.probed
        assert {name: both[1] for name, both in probed.items() if both[1] is not None} == {}
        assert {name for name, both in probed.items() if both[0] is None} == set()
        # Of a GPU that is wanted; but for what one would have turned into numbers, or been named.
        other = ("splits", "random", "type names")
        told = [both[0] or "" for name, both in probed.items() if name not in other]
        assert all("CUDA" in text or "NVIDIA" in text for text in told), told
