"""The rule for spikes worked by hand, and what a config of it may not say."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from recipes.runtime.config import FaultsConfig
from recipes.training.guards.step_guard import NO_UPDATE, StepGuard, Verdict

CONFIG = FaultsConfig(spike_sigma=2.0, spike_window=4)


def feed(guard: StepGuard, *pairs: tuple[float, float]) -> list[Verdict]:
    """Judges steps of these losses and norms."""
    return [guard.judge(loss, norm).verdict for loss, norm in pairs]


def test_limits_worked_by_hand() -> None:
    guard = StepGuard(CONFIG)
    # Half of the window must be known.
    assert feed(guard, (1.0, 10.0), (3.0, 10.0)) == [Verdict.UPDATED] * 2
    # Losses 1 and 3: mean 2, deviation sqrt((1 - 2)^2 + (3 - 2)^2) = sqrt(2); limit 2 + 2 sqrt(2) = 4.83.
    assert guard.norm_limit(4.82) == 10.0
    assert guard.norm_limit(4.83) == NO_UPDATE
    found = guard.judge(4.83, 10.0)
    assert (found.verdict, found.in_a_row, found.skipped) == (Verdict.SPIKE, 1, 1)
    assert found.limits == pytest.approx((2 + 2 * math.sqrt(2), 10.0))
    # The norm has its own window, and the skipped step is in both: norms 10, 10, 10 allow no more than 10.
    assert feed(guard, (2.0, 10.5), (2.0, 9.0)) == [Verdict.SPIKE, Verdict.UPDATED]
    # The oldest loss is gone: 3, 4.83, 2, 2.
    mean = (3 + 4.83 + 2 + 2) / 4
    deviation = math.sqrt(sum((loss - mean) ** 2 for loss in (3, 4.83, 2, 2)) / 3)
    assert guard.judge(0.0, 0.0).limits[0] == pytest.approx(mean + 2 * deviation)


def test_what_is_not_finite_is_counted_and_forgotten() -> None:
    guard = StepGuard(CONFIG)
    feed(guard, (1.0, 1.0), (1.5, 2.0))
    before = guard.state()
    assert guard.norm_limit(math.nan) == guard.norm_limit(math.inf) == NO_UPDATE
    rows = [guard.judge(*pair) for pair in ((math.nan, 1.0), (1.0, math.inf), (1.0, math.nan))]
    assert [row.verdict for row in rows] == [Verdict.NONFINITE] * 3
    assert [row.in_a_row for row in rows] == [1, 2, 3]
    assert guard.state()["losses"] == before["losses"] and guard.state()["norms"] == before["norms"]
    assert guard.judge(1.0, 1.0).in_a_row == 0 and guard.judge(math.nan, 1.0).in_a_row == 1
    assert guard.skipped == 4


def test_without_a_rule_no_finite_step_is_skipped() -> None:
    guard = StepGuard(FaultsConfig())
    assert feed(guard, *[(1.0, 1.0)] * 200, (1e30, 1e30)) == [Verdict.UPDATED] * 201
    assert guard.state()["losses"] == []


def test_the_state_survives_json() -> None:
    guard = StepGuard(CONFIG)
    feed(guard, (0.1, 1 / 3), (0.2, 2 / 3), (9.0, 0.5))
    other = StepGuard(CONFIG, json.loads(json.dumps(guard.state())))
    assert other.state() == guard.state() and other.norm_limit(0.2) == guard.norm_limit(0.2)
    # A checkpoint from before there was a guard.
    assert StepGuard(CONFIG, None).state() == StepGuard(CONFIG, {}).state() == StepGuard(CONFIG).state()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_nonfinite": 0}, "max_nonfinite=0: must be at least 1"),
        ({"spike_sigma": 0.0}, "spike_sigma=0.0: must be more than 0"),
        ({"spike_window": 3}, "spike_window=3: must be at least 4"),
        ({"spike_sigma": 6.0, "rollback_after": 0}, "rollback_after=0: must be at least 1"),
        ({"rollback_after": 2}, "rollback_after=2: must come with spike_sigma"),
        ({"hang_s": 0.0}, "hang_s=0.0: must be more than 0 seconds"),
        ({"phase_hang_s": -1.0}, "phase_hang_s=-1.0: must be more than 0 seconds"),
    ],
)
def test_refused_configs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FaultsConfig(**fields)
