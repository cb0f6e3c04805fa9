"""Distinct experts and utilisation: sums before ratios, None for what was not measured, bounds named."""

from __future__ import annotations

import random
import warnings
from dataclasses import replace

import pytest

from moe.accounting.distinct import (
    DistinctExperts,
    all_distinct,
    estimated_distinct,
    expected_distinct,
    expected_distinct_of,
    traced_distinct,
)
from moe.accounting.passes import decode_batch, pass_flops
from moe.accounting.shape import shape_from_config
from moe.accounting.utilisation import Machine, Pass, practical_peak, utilisation, utilisations
from tests.moe.accounting.published import MIXTRAL_8X7B, QWEN3_30B

SHAPE = shape_from_config({**MIXTRAL_8X7B, "num_hidden_layers": 2})
GB = 1e9


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (60, 4), (64, 6), (256, 8), (1, 1), (7, 7)])
def test_expected_experts_are_bounded_and_grow(experts: int, top_k: int) -> None:
    values = [expected_distinct(experts, top_k, tokens) for tokens in range(0, 200)]
    assert values[0] == 0 and values[1] == top_k
    assert values == sorted(values)
    assert all(value <= min(experts, tokens * top_k) + 1e-9 for tokens, value in enumerate(values))


def test_expected_experts_by_hand() -> None:
    # 8 * (1 - (3/4)^2)
    assert expected_distinct(8, 2, 2) == 3.5
    # unequal shares, here all tokens to the same two, touch fewer
    assert expected_distinct_of([1, 1, 0, 0, 0, 0, 0, 0], 2) == 2
    assert expected_distinct_of([0.25] * 8, 2) == 3.5
    assert expected_distinct_of([0.5, 0.5, *[1 / 6] * 6], 2) < 3.5


def test_expected_experts_hold_on_average() -> None:
    generator = random.Random(0)
    trials = [
        len({expert for _ in range(5) for expert in generator.sample(range(16), 3)}) for _ in range(4000)
    ]
    # the deviation of a trial is below 1.3, of the mean of 4000 below 0.021
    assert sum(trials) / len(trials) == pytest.approx(expected_distinct(16, 3, 5), abs=0.08)


@pytest.mark.parametrize(("experts", "top_k", "tokens"), [(8, 0, 1), (8, 9, 1), (8, 2, -1)])
def test_impossible_routing_is_refused(experts: int, top_k: int, tokens: int) -> None:
    with pytest.raises(ValueError, match="must be in 1 to 8"):
        expected_distinct(experts, top_k, tokens)


def test_the_source_of_distinct_experts_is_told() -> None:
    traced = traced_distinct([[3, 0, 1, 0], [1, 1, 1, 1]])
    assert traced == DistinctExperts((2, 4), "traced") and traced.mean == 3
    assert estimated_distinct(SHAPE, 2) == DistinctExperts((3.5, 3.5), "estimated-uniform-upper-bound")
    assert DistinctExperts((), "traced").mean is None


def test_two_passes_are_a_ratio_of_sums() -> None:
    # 10 GB in 10 ms and 2 GB in 1 ms at 1 TB/s: 12/11; the mean of the ratios would be 1.5.
    with pytest.warns(UserWarning, match=r"S-MBU is 1.09, above 1: the peak is of another device .* cache"):
        share = utilisation("S-MBU", [10 * GB, 2 * GB], [0.010, 0.001], 1e12)
    assert share == pytest.approx(12 / 11)
    assert utilisation("S-MBU", [10 * GB], [0.010], 1e12, devices=4) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("work", "seconds", "peak"),
    [
        ([], [], 1e12),
        ([1.0], [1.0], None),
        ([1.0, None], [1.0, 1.0], 1e12),
        ([1.0, 1.0], [1.0, None], 1e12),
    ],
)
def test_what_was_not_measured_is_none(
    work: list[float | None], seconds: list[float | None], peak: float | None
) -> None:
    assert utilisation("S-MFU", work, seconds, peak) is None


@pytest.mark.parametrize(
    ("work", "seconds", "peak", "devices"),
    [
        ([1.0], [], 1.0, 1),
        ([-1.0], [1.0], 1.0, 1),
        ([1.0], [0.0], 1.0, 1),
        ([1.0], [1.0], 0.0, 1),
        ([1.0], [1.0], 1.0, 0),
        ([float("nan")], [1.0], 1.0, 1),
    ],
)
def test_what_is_no_measurement_is_refused(
    work: list[float | None], seconds: list[float | None], peak: float, devices: int
) -> None:
    with pytest.raises(ValueError, match="must|passes have work"):
        utilisation("MBU", work, seconds, peak, devices)


def test_above_one_names_what_is_likely_wrong() -> None:
    with pytest.warns(UserWarning, match="MBU is 2.00, above 1: .* counts every expert as read"):
        utilisation("MBU", [2.0], [1.0], 1.0)
    with pytest.warns(UserWarning, match="S-MFU is 2.00, above 1: .* dtype"):
        utilisation("S-MFU", [2.0], [1.0], 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert utilisation("S-MBU", [1.0], [1.0], 1.0) == 1.0


def test_all_utilisations_of_a_run() -> None:
    # Complete: A1 of two layers, an embedding row, keys read and one written.
    shape = shape_from_config(QWEN3_30B)
    passes = [Pass(decode_batch(1, 1), 0.1, estimated_distinct(shape, 1))] * 2
    found = utilisations(shape, passes, Machine(1e12, 1e14))
    assert found.s_mbu == pytest.approx((2 * (3_041_867_776 + 2048) + 2 * 98_304) / 0.1 / 1e12)
    assert found.s_mbu_strict == pytest.approx((5_435_817_984 + 98_304) / 0.1 / 1e12)
    assert found.mbu == pytest.approx((2 * (30_532_122_624 - 311_164_928 + 2048) + 2 * 98_304) / 0.1 / 1e12)
    assert found.s_mfu == pytest.approx(pass_flops(shape, decode_batch(1, 1)) / 0.1 / 1e14)
    assert found.s_mfu is not None and found.mfu is not None and found.s_mfu_strict is not None
    assert found.s_mfu_strict < found.s_mfu < found.mfu
    assert found.distinct_source == "estimated-uniform-upper-bound"


def test_all_ones_make_s_mbu_the_mbu() -> None:
    everything = DistinctExperts(all_distinct(SHAPE), "traced")
    found = utilisations(SHAPE, [Pass(decode_batch(3, 50), 0.01, everything)], Machine(1e12, 1e15))
    assert found.s_mbu == found.mbu
    dense = shape_from_config({**MIXTRAL_8X7B, "model_type": "llama"})
    nothing = DistinctExperts((), "traced")
    found = utilisations(dense, [Pass(decode_batch(3, 50), 0.1, nothing)], Machine(1e12, 1e15))
    assert found.s_mbu == found.mbu and found.s_mfu == found.mfu


def test_parts_that_are_missing_leave_the_others() -> None:
    whole = Pass(decode_batch(1, 9), 0.1, estimated_distinct(SHAPE, 1))
    unseen = replace(whole, distinct=None)
    found = utilisations(SHAPE, [whole, unseen], Machine(1e12, None))
    assert (found.s_mbu, found.s_mbu_strict, found.s_mfu, found.mfu) == (None, None, None, None)
    assert found.mbu is not None and found.distinct_source is None
    assert utilisations(SHAPE, [], Machine(1e12, 1e12)).mbu is None
    assert utilisations(SHAPE, [replace(whole, seconds=None)], Machine(1e12, 1e12)).s_mfu is None


def test_the_peak_that_a_device_needs() -> None:
    # 10 GB in 0.1 s are 100 GB/s; at half of the peak it needs 200.
    assert practical_peak(10 * GB, 0.1, 0.5) == pytest.approx(200 * GB)
    with pytest.raises(ValueError, match="must be above 0"):
        practical_peak(1, 0, 0.5)
