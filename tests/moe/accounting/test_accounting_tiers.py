"""Memories of several speeds, worked by hand."""

from __future__ import annotations

import pytest

from moe.accounting.bytes import StepBytes
from moe.accounting.tiers import least_seconds, read_tiers, tier_uses
from moe.errors import ConfigError

STEP = StepBytes(attention=1e9, experts=8e9, kv_read=2e9, head=1e9)


def test_offloaded_experts_by_hand() -> None:
    tiers = read_tiers(["hbm=1000", "pcie=50:experts=0.75", "disk=5:experts=0.05,kv_read"])
    uses = tier_uses(STEP, tiers, seconds=1.0)
    # hbm: 1 + 1 + a fifth of 8; pcie: 6 of 8; disk: 0.4 of 8 and the 2 of the cache
    assert [use.bytes for use in uses] == pytest.approx([3.6e9, 6e9, 2.4e9])
    assert sum(use.bytes for use in uses) == pytest.approx(STEP.complete)
    assert [use.least_s for use in uses] == pytest.approx([0.0036, 0.12, 0.48])
    assert [use.utilisation for use in uses] == pytest.approx([0.0036, 0.12, 0.48])
    assert least_seconds(uses) == pytest.approx((0.48, 0.6036))


def test_one_tier_is_the_whole_step() -> None:
    (use,) = tier_uses(STEP, read_tiers(["hbm=1000"]))
    assert use.bytes == STEP.complete and use.utilisation is None


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["hbm"], "not of the form"),
        (["hbm=fast"], "its bandwidth is 'fast'"),
        (["hbm=0"], "above 0"),
        (["hbm=1", "pcie=1:weights=1"], "'weights' is no part"),
        (["hbm=1", "pcie=1:experts=1.5"], "1 is all of it"),
        (["hbm=1", "a=1:experts=0.6", "b=1:experts=0.6"], "1 at most"),
        (["hbm=1:experts=1"], "the first tier holds what the others leave"),
        (["hbm=1", "hbm=2:experts=1"], "two tiers have one name"),
    ],
)
def test_mistakes(texts: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_tiers(texts)
