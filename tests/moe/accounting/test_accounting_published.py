"""Published models against figures counted apart from this code, and against what their makers say."""

from __future__ import annotations

from typing import Any

import pytest

from moe.accounting.bytes import BitWidths, kv_bytes_per_token, step_bytes, weight_bytes
from moe.accounting.distinct import all_distinct, estimated_distinct, touched_share
from moe.accounting.flops import flops_from_shape
from moe.accounting.layers import ModelShape
from moe.accounting.params import count_from_shape
from moe.accounting.passes import Batch, decode_batch
from moe.accounting.shape import shape_from_config
from moe.accounting.utilisation import practical_peak
from tests.moe.accounting.published import (
    DBRX,
    DEEPSEEK_V3,
    GPT_OSS_20B,
    JAMBA,
    LLAMA4_MAVERICK,
    MIXTRAL_8X7B,
    MODELS,
    QWEN3_30B,
    Published,
)


def shape_of(config: dict[str, Any]) -> ModelShape:
    return shape_from_config(config)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_counts_are_exact(model: Published) -> None:
    shape = shape_of(model.config)
    count = count_from_shape(shape)
    assert count.total == model.total
    assert count.active == model.active
    assert count.active_without_input_embedding == model.without_input
    assert count.active_without_embeddings == model.without_both
    assert count.per_expert == model.expert
    assert count.total - count.routed - count.looked_up == model.always
    assert kv_bytes_per_token(shape) == model.kv
    assert weight_bytes(shape) == 2 * model.total


# Billions as published: total, active, and the convention that the active ones are counted by.
@pytest.mark.parametrize(
    ("name", "total", "active", "convention"),
    [
        ("Mixtral-8x7B", "46.7", "12.9", "active"),
        ("Qwen1.5-MoE-A2.7B", "14.3", "2.7", "active"),
        ("OLMoE-1B-7B", "6.9", "1.3", "active"),
        ("gpt-oss-20b", "20.9", "3.6", "active_without_input_embedding"),
        ("gpt-oss-120b", "116.8", "5.1", "active_without_input_embedding"),
        ("DeepSeek-V3", "671.0", "36.6", "active_without_input_embedding"),
    ],
)
def test_publishers_count_differently(name: str, total: str, active: str, convention: str) -> None:
    count = count_from_shape(shape_of(MODELS[name].config))
    assert f"{count.total / 1e9:.1f}" == total
    assert f"{getattr(count, convention) / 1e9:.1f}" == active


def test_models_without_a_reference_in_every_column() -> None:
    jamba = count_from_shape(shape_of(JAMBA))
    assert (jamba.total, jamba.active) == (51_570_323_328, 12_110_311_296)
    dbrx = count_from_shape(shape_of(DBRX))
    assert (round(dbrx.total / 1e9), round(dbrx.active / 1e9)) == (132, 36)
    maverick = count_from_shape(shape_of(LLAMA4_MAVERICK))
    assert (f"{maverick.total / 1e9:.2f}", f"{maverick.active / 1e9:.2f}") == ("400.71", "17.18")


def test_flops_of_torchtitan() -> None:
    # pytorch/torchtitan pull request 4300; 6 * 3,041,867,776 + 6 * 48 * 32 * 256 * 8192
    assert flops_from_shape(shape_of(QWEN3_30B), 8192, "torchtitan").training == 37_578_559_488


# Megatron-Bridge, performance summary, GB200, S=4096: TFLOP/s a GPU over tokens/s a GPU.
@pytest.mark.parametrize(
    ("config", "tera", "tokens", "ours"),
    [(DEEPSEEK_V3, 1276, 4912, "259.99"), (QWEN3_30B, 923, 39936, "23.01")],
)
def test_flops_of_megatron(config: dict[str, Any], tera: float, tokens: float, ours: str) -> None:
    flops = flops_from_shape(shape_of(config), 4096, "megatron").training
    assert flops == pytest.approx(tera * 1e12 / tokens, rel=0.005)
    assert f"{flops / 1e9:.2f}" == ours


def test_mbu_overestimates_a_layer_of_mixtral() -> None:
    # attention 41,943,040 and 8 experts of 176,160,768, over attention and 2: 3.6809
    shape = shape_of({**MIXTRAL_8X7B, "num_hidden_layers": 1})
    batch = decode_batch(1, 1)
    all_of_them = step_bytes(shape, batch, all_distinct(shape))
    touched = step_bytes(shape, batch, estimated_distinct(shape, 1).per_layer)
    layer = [step.attention + step.experts for step in (all_of_them, touched)]
    assert layer[1] == 2 * (41_943_040 + 2 * 176_160_768)
    assert layer[0] / layer[1] == pytest.approx(3.6809, abs=5e-5)
    assert f"{layer[0] / layer[1] - 1:.0%}" == "268%"


def test_decode_bytes_of_one_token() -> None:
    shape = shape_of(QWEN3_30B)
    step = step_bytes(shape, decode_batch(1, 1), [8] * 48)
    assert step.weights - step.embedding == 2 * 3_041_867_776
    assert step.embedding == 2 * 2048  # one row
    assert step.strict - step.kv_read == 48 * (18_874_368 + 8 * 4_718_592) * 2
    assert f"{(step.strict - step.kv_read) / 1e9:.4f}" == "5.4358"
    assert (step.kv_read, step.kv_written) == (98_304, 98_304)


def test_quantised_experts() -> None:
    model = MODELS["gpt-oss-20b"]
    routed = 24 * 32 * model.expert
    expected = routed * 0.53125 + (model.total - routed) * 2
    assert weight_bytes(shape_of(GPT_OSS_20B), BitWidths(expert=4.25)) == expected


# Percent of all parameters that a batch of 1, 2, 4, 8, 16, 32 touches under uniform routing; None as printed.
@pytest.mark.parametrize(
    ("name", "experts", "percent"),
    [
        ("Mixtral-8x7B", [2.0, 3.5, 5.5, 7.2, 7.9, 8.0], [27.6, 45.7, 69.4, 90.3, 99.0]),
        ("Qwen1.5-MoE-A2.7B", [4.0, 7.7, 14.5, 25.5, 40.1, 53.4], [18.8, 24.2, 34.0, 49.9, 71.1, 90.4]),
        ("DeepSeek-V2-Lite", [6.0, 11.4, 20.8, 34.9, 50.8, 61.3], [16.9, 24.7, 38.2, 58.3, 81.0, 96.1]),
        ("DeepSeek-V3", [8.0, 15.8, 30.5, 57.4, 102.0, 163.3], [5.6, 8.5, 14.2, 24.4, 41.4, 64.7]),
        ("Qwen3-30B-A3B", [8.0, 15.5, 29.1, 51.6, 82.4, 111.8], [11.0, 16.5, 26.7, 43.3, 66.2, 88.0]),
        ("OLMoE-1B-7B", [8.0, 15.0, 26.5, 42.0, 56.4, 63.1], [18.5, 28.7, 45.4, 68.0, 89.0]),
        ("gpt-oss-120b", [4.0, 7.9, 15.3, 28.7, 51.0, 81.7], [4.9, 7.9, 13.5, 23.8, 40.9, 64.5]),
    ],
)
def test_share_of_parameters_that_a_batch_touches(
    name: str, experts: list[float], percent: list[float]
) -> None:
    shape = shape_of(MODELS[name].config)
    found = [estimated_distinct(shape, 2**power) for power in range(6)]
    assert [round(one.mean or 0, 1) for one in found] == experts
    shares = [round(100 * touched_share(shape, one.per_layer), 1) for one in found]
    assert shares[: len(percent)] == percent


def test_measured_shares_stay_below_the_bound() -> None:
    # MoE-CAP, section 4.3: MATH, batches of 8. Its leaderboard: Qwen3-235B, batches of 16, 57.745 experts.
    for name, measured in (
        ("DeepSeek-V2-Lite", 0.5305),
        ("Qwen1.5-MoE-A2.7B", 0.4679),
        ("DeepSeek-V3", 0.1844),
    ):
        shape = shape_of(MODELS[name].config)
        assert touched_share(shape, estimated_distinct(shape, 8).per_layer) > measured
    mean = estimated_distinct(shape_of(MODELS["Qwen3-235B-A22B"].config), 16).mean
    assert mean is not None and mean > 57.745


def test_bandwidth_that_deepseek_r1_needs() -> None:
    # MoE-CAP, section 4.3, at 0.1 s a token: 18,901 GB/s if all was read, so that S-MBU was taken as 0.710.
    needed = practical_peak(2 * MODELS["DeepSeek-V3"].total, 0.1, 0.71)
    assert needed / 1e9 == pytest.approx(18_901, rel=2e-3)


def test_cache_of_windows() -> None:
    # gpt-oss-20b: 24 layers of 2 * 8 * 64 * 2 = 2048 bytes a key; 12 of them see 128 keys at most.
    step = step_bytes(shape_of(GPT_OSS_20B), Batch((1000, 100)), [4] * 24)
    assert step.kv_read == 2048 * (12 * (1000 + 128) + 24 * 100)
    assert step.kv_written == 2048 * 24 * 2
