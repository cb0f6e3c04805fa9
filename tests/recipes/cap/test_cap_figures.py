"""The arithmetic of a report by hand: utilisations, cost, EfficientLLM's metrics, what is null and why."""

from __future__ import annotations

import math
from typing import Any

import pytest

from moe.accounting.bytes import uniform_bits
from moe.accounting.distinct import traced_distinct
from moe.accounting.layers import DenseFFNShape, LayerShape, ModelShape, MoEShape
from moe.accounting.mixers import AttentionShape
from moe.accounting.passes import decode_batch
from moe.accounting.utilisation import Machine
from recipes.cap.cost import HOURS_A_YEAR, LISTINGS, Prices, cost_figures, find_rates
from recipes.cap.efficiency import compression, efficiency
from recipes.cap.loading import Known
from recipes.cap.phases import UTILISATIONS, Passes, phase_figures
from recipes.tracking.meters import Reading

# One layer, width 4: attention 4 * 4 * 4 = 64 weights (one head of 4), an expert 3 * 4 * 2 = 24, a router of
# 4 * 8 = 32, two norms of 4 and one at the end, 10 words: embedding 40, head 40.
MOE = ModelShape(
    (LayerShape(AttentionShape(1, 1, 4), MoEShape(8, 2, 2)),),
    hidden_size=4,
    vocab_size=10,
    tied_embeddings=False,
)
DENSE = ModelShape(
    (LayerShape(AttentionShape(1, 1, 4), DenseFFNShape(2)),),
    hidden_size=4,
    vocab_size=10,
    tied_embeddings=False,
)
BITS = uniform_bits(32)


def known(shape: ModelShape | None, reason: str | None = None) -> Known:
    return Known(shape=shape, shape_reason=reason, bits=BITS, bits_source="a test")


def passes(*seconds: float, used: int = 3) -> Passes:
    """Passes that each touch ``used`` of eight experts."""
    one = traced_distinct([[1] * used + [0] * (8 - used)])
    return Passes(seconds=seconds, distinct=(one,) * len(seconds))


def test_bandwidth_by_hand() -> None:
    # Two sequences that now have 5 and then 6 tokens. In fp32, by elements:
    #   attention 64, three experts 72, router 32, norms 12, head 40, two rows of the embedding 8 = 228
    #   keys and values: a token holds 8; read 2 * 5 * 8 = 80, then 96; written 2 * 8 = 16 each time
    # so 324 and 340 elements, 1296 and 1360 bytes, in 0.5 + 1.5 s of 1000 bytes/s
    machine = Machine(bytes_per_s=1000.0, flops=None)
    found = phase_figures(
        known(MOE), [passes(0.5, 1.5)], slice(None), [decode_batch(2, 5), decode_batch(2, 6)], machine
    )
    assert found["bytes"]["complete"] == 1296 + 1360
    assert found["s_mbu"] == (1296 + 1360) / 2 / 1000
    # a ratio of sums, not the mean of 1296 / 500 and 1360 / 1500
    assert found["s_mbu"] != pytest.approx((1296 / 500 + 1360 / 1500) / 2)
    # equation 4: attention, experts and what is read of the cache: 64 + 72 + 80 and 96
    assert found["s_mbu_strict"] == 4 * (136 + 80 + 136 + 96) / 2 / 1000
    # as if all eight experts were read: 5 * 24 more in each pass
    assert found["mbu"] == (1296 + 1360 + 2 * 4 * 120) / 2 / 1000
    assert found["s_mfu"] is found["mfu"] is found["s_mfu_strict"] is None
    assert found["utilisation_reason"] == "the peak FLOP/s is not known"
    assert (found["passes"], found["seconds"], found["tokens_per_s"]) == (2, 2.0, 2.0)
    assert found["distinct"]["mean"] == 3 and found["distinct"]["per_layer"] == [3]
    # of two tokens under uniform routing: 8 (1 - (1 - 2/8)^2) = 3.5
    assert found["distinct"]["uniform_bound"] == 3.5
    # 348 weights in all (64 + 192 + 32 + 12 - 4 + ...): embedding and head 80, less five idle experts
    total = 64 + 8 * 24 + 32 + 12 + 80
    assert found["distinct"]["parameters_touched"] == pytest.approx((total - 5 * 24) / total)


def test_compute_by_hand() -> None:
    # One token that is the fifth: 2 * (64 + 2 * 24 + 32) + head 2 * 40, scores 2 * 8 * 5 = 448 FLOPs
    machine = Machine(bytes_per_s=None, flops=1000.0)
    found = phase_figures(known(MOE), [passes(2.0)], slice(None), [decode_batch(1, 5)], machine)
    assert found["flops"] == 448 and found["s_mfu"] == 448 / 2 / 1000
    assert found["s_mfu_strict"] == (448 - 80) / 2 / 1000
    assert found["mfu"] == (448 + 2 * 6 * 24) / 2 / 1000  # six more experts
    assert found["flops_per_byte"] == 448 / found["bytes"]["complete"]
    assert found["utilisation_reason"] == "the peak bandwidth is not known"


def test_a_dense_model_has_one_utilisation() -> None:
    run = Passes(seconds=(1.0,), distinct=(traced_distinct([]),))
    machine = Machine(bytes_per_s=1e4, flops=1e4)
    found = phase_figures(known(DENSE), [run], slice(None), [decode_batch(1, 5)], machine)
    assert found["s_mbu"] == found["mbu"] > 0 and found["s_mfu"] == found["mfu"] > 0
    assert found["distinct"] is None and found["utilisation_reason"] is None


def test_rounds_are_one_ratio_of_sums() -> None:
    machine = Machine(1000.0, 1000.0)
    batch = [decode_batch(1, 5)]
    both = phase_figures(known(MOE), [passes(1.0), passes(3.0)], slice(None), batch, machine)
    whole = [phase_figures(known(MOE), [passes(s)], slice(None), batch, machine) for s in (1.0, 3.0)]
    work = sum(one["bytes"]["complete"] for one in whole)
    assert both["s_mbu"] == work / 4 / 1000
    assert both["s_mbu"] < (whole[0]["s_mbu"] + whole[1]["s_mbu"]) / 2


def test_above_one_warns_with_the_cause() -> None:
    machine = Machine(bytes_per_s=10.0, flops=10.0)
    found = phase_figures(known(MOE), [passes(1.0)], slice(None), [decode_batch(1, 5)], machine)
    assert found["s_mbu"] > 1 and found["s_mfu"] > 1
    assert any(
        "S-MBU" in line and "above 1: the peak is of another device" in line for line in found["warnings"]
    )
    assert all(line.startswith("S-") for line in found["warnings"])


def test_what_is_not_known_is_null_with_a_reason() -> None:
    machine, batch = Machine(1000.0, 1000.0), [decode_batch(1, 5)]
    unwatched = Passes(seconds=(1.0,), distinct=None)
    found = phase_figures(known(MOE), [unwatched], slice(None), batch, machine)
    assert found["s_mbu"] is found["s_mbu_strict"] is found["bytes"] is None
    assert found["utilisation_reason"] == "experts were not watched"
    assert found["s_mfu"] > 0 and found["mbu"] > 0  # neither needs to know which experts
    found = phase_figures(known(None, "no such family"), [passes(1.0)], slice(None), batch, machine)
    assert all(found[name] is None for name in UTILISATIONS) and found["flops"] is None
    assert found["utilisation_reason"] == "no such family" and found["tokens_per_s"] == 1.0


def test_cost_by_hand() -> None:
    # 1000 tokens/s: 1000 s = 1/3.6 h a million. $36,000 over 4 years, half of them busy: 36000 / 17532 $/h.
    # 300 W * 1.2 * $0.2 = $0.072 an hour.
    rates = find_rates("x", Prices(price_usd=36_000, power_watts=300, usd_per_kwh=0.2))
    found = cost_figures(rates, 1000.0, None)
    assert found["purchase_usd_per_mtok"] == pytest.approx(36_000 / (4 * HOURS_A_YEAR * 0.5) / 3.6)
    assert found["energy_usd_per_mtok"] == pytest.approx(0.072 / 3.6)
    assert found["usd_per_mtok"] == found["purchase_usd_per_mtok"] + found["energy_usd_per_mtok"]
    assert (found["watts"], found["watts_source"], found["reason"]) == (300, "given by the user", None)
    measured = cost_figures(rates, 1000.0, 150.0)
    assert measured["energy_usd_per_mtok"] == pytest.approx(0.036 / 3.6)
    assert measured["watts_source"] == "measured"


def test_no_price_is_guessed() -> None:
    found = cost_figures(find_rates("CPU", Prices(power_watts=100)), 10.0, None)
    assert (
        found["usd_per_mtok"] is found["purchase_usd_per_mtok"] is None and found["energy_usd_per_mtok"] > 0
    )
    assert "does not know 'CPU'; give --price-usd" in found["reason"]
    found = cost_figures(find_rates("CPU", Prices(price_usd=1)), 10.0, None)
    assert found["usd_per_mtok"] is None and "give --power-watts" in found["reason"]
    assert cost_figures(find_rates("CPU", Prices(1, 1)), None, None)["reason"] == "nothing was measured"


def test_prices_of_the_table_are_dated_and_overridden() -> None:
    rates = find_rates("NVIDIA H100 80GB HBM3", Prices(), devices=8)
    assert rates.price_usd == 8 * 38_000 and rates.power_watts == 8 * 700
    assert (
        "2026-08" in rates.price_source and "not measured" in rates.power_source and rates.usd_per_kwh == 0.15
    )
    mine = find_rates("NVIDIA H100 80GB HBM3", Prices(price_usd=1.0), devices=8)
    assert (mine.price_usd, mine.price_source) == (1.0, "given by the user")
    assert all(row.date and row.source and row.usd > 0 and row.watts > 0 for row in LISTINGS.values())


def point(**change: Any) -> dict[str, Any]:
    """As far as EfficientLLM's metrics look at it."""
    return {
        "prefill": {"flops": 100.0, "seconds": 1.0},
        "decode": {"flops": 300.0, "seconds": 3.0},
        "request_s": {"mean": 2.0},
        "tokens_per_s": 5.0,
        "energy": {"watts": None, "detail": "no meter"},
        "reason": None,
        **change,
    }


def test_efficientllm_by_hand() -> None:
    found = efficiency(point(), Reading(25.0, "resident"), 100.0, 1000.0)
    reasons = found.pop("reasons")
    # 25 of 100 bytes; 400 FLOPs in 4 s of 1000 FLOP/s
    assert found == {
        "amu": 0.25,
        "pcu": 0.1,
        "al_s": 2.0,
        "tt": None,
        "st": None,
        "it_tokens_per_s": 5.0,
        "aec_watts": None,
    }
    assert reasons.keys() == {"tt", "st", "aec_watts"} and reasons["aec_watts"] == "no meter"
    none = efficiency(point(), Reading(None, "not told"), 100.0, None)
    assert none["amu"] is none["pcu"] is None and none["reasons"]["amu"] == "not told"


def test_compression_by_hand() -> None:
    def system(name: str, size: float | None, right: float | None) -> dict[str, Any]:
        choices = None if right is None else {"accuracy": right}
        return {"name": name, "weights": {"held_bytes": size}, "accuracy": {"choices": choices}}

    rates = compression([system("a", 100, 0.5), system("b", 25, 0.4), system("c", 50, None)])
    # a quarter of the size, 80 % of the accuracy: 4 * 0.8
    assert [rate["mcr"] for rate in rates] == [1.0, pytest.approx(3.2), None]
    assert rates[2]["mcr_reason"] == "no accuracy to compare: give --choices or --answers"
    assert compression([system("a", 100, 0.0)])[0]["mcr"] is None
    assert compression([system("a", None, 0.5)])[0]["mcr_reason"] == "the size of the weights is not known"
    assert not any(math.isnan(rate["mcr"]) for rate in rates if rate["mcr"] is not None)
