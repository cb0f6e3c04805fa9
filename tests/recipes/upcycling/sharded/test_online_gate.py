"""The step-0 gate on shards says what the gate in one memory says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pytest

from tests.recipes.upcycling.sharded.conftest import LookOnRanks

# Of fp32, in another order of summation: the bound of the engine tests.
_ROUNDING = 5e-6


@pytest.fixture(params=[1, 2])
def found(request: pytest.FixtureRequest, look_on_ranks: LookOnRanks) -> list[Mapping[str, Any]]:
    """What each rank has seen."""
    return look_on_ranks(request.param)


@pytest.mark.slow
@pytest.mark.distributed
def test_figures_are_those_of_the_gate_in_one_memory(found: list[Mapping[str, Any]]) -> None:
    for one in found:
        for name, case in one["measured"].items():
            assert case.report.method == case.whole.method and case.report.layers == case.whole.layers
            assert (
                case.report.claimed_exact == case.whole.claimed_exact == (name not in ("inexact", "spread"))
            )
            logits, whole = asdict(case.report.logits), asdict(case.whole.logits)
            assert logits == pytest.approx(whole, rel=1e-3, abs=_ROUNDING * whole["max_logit"]), name
            for ours, theirs in zip(case.report.drifts, case.whole.drifts, strict=True):
                assert asdict(ours) == pytest.approx(asdict(theirs), rel=1e-3, abs=1e-5), name
            assert case.report.load_entropy == pytest.approx(case.whole.load_entropy), name


@pytest.mark.slow
@pytest.mark.distributed
def test_what_was_measured_is_what_is_trained(found: list[Mapping[str, Any]]) -> None:
    for one in found:
        assert one["measured"]["exact"].logits <= _ROUNDING and one["measured"]["inexact"].logits <= _ROUNDING
        # In 16 bits the logits move by a rounding step or two, and the gate before was in fp32 all the same.
        assert _ROUNDING < one["measured"]["bf16"].logits < 0.05
        assert one["measured"]["bf16"].report.logits.relative <= _ROUNDING


@pytest.mark.slow
@pytest.mark.distributed
def test_a_method_that_is_not_what_it_claims_is_refused(found: list[Mapping[str, Any]]) -> None:
    for one in found:
        assert "claims to keep the function and does not" in one["unsupported_reason"]
        assert (
            "Differing: layer 1 (by" in one["unsupported_reason"]
            and "layer 0" not in one["unsupported_reason"]
        )
