"""Memory tiers, e.g. for offloaded experts: bytes, utilisation and the least time of each.

A single bandwidth does not describe a model in two memories: experts behind PCIe limit a step that the
device's own memory would allow in a tenth of the time. MoE-CAP (arXiv:2412.07067) divides by a single peak;
here the bytes of each memory are divided by its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from moe.accounting.bytes import StepBytes
from moe.errors import ConfigError, Mistake

PARTS = tuple(field.name for field in fields(StepBytes))
_FORM = "NAME=GB/S, or NAME=GB/S:PART=SHARE,..."


@dataclass(frozen=True)
class Tier:
    """Memory tier.

    Attributes:
        name: Its name, such as ``hbm`` or ``pcie``.
        bytes_per_s: Its bandwidth, over all devices together.
        shares: Share of the bytes of each part of `StepBytes` that is read from here. The first tier gets
            none: it holds what the others leave.
    """

    name: str
    bytes_per_s: float
    shares: Mapping[str, float]


@dataclass(frozen=True)
class TierUse:
    """Use of one memory tier by a step.

    Attributes:
        name: Name of the tier.
        bytes: Bytes read from it and written to it.
        least_s: Seconds that these take at its bandwidth.
        utilisation: Share of its bandwidth over the measured time; None without one.
    """

    name: str
    bytes: float
    least_s: float
    utilisation: float | None


def read_tiers(texts: Sequence[str], flag: str = "--tier") -> tuple[Tier, ...]:
    """Parses ``hbm=3350`` and ``pcie=55:experts=0.75,kv_read=0.5``; bandwidths in 10^9 bytes per second.

    Raises:
        ConfigError: A text is not of this form, a part is unknown, or its shares exceed 1.
    """
    tiers, mistakes = [], []
    for text in texts:
        try:
            tiers.append(_tier(text))
        except ValueError as error:
            mistakes.append(Mistake(flag, text, str(error), f"Write {_FORM}."))
    if tiers and tiers[0].shares:
        rule = "the first tier holds what the others leave, and is given no parts"
        mistakes.append(Mistake(flag, texts[0], rule, "Name the device's own memory first, without parts."))
    names = [tier.name for tier in tiers]
    if len(set(names)) < len(names):
        mistakes.append(Mistake(flag, names, "two tiers have one name", "Name them apart."))
    for part in PARTS:
        placed = sum(tier.shares.get(part, 0.0) for tier in tiers)
        if placed > 1 + 1e-9:
            mistakes.append(
                Mistake(flag, f"{part}={placed:g}", "the shares of a part are 1 at most", "Lower one.")
            )
    if mistakes:
        raise ConfigError(mistakes)
    return tuple(tiers)


def _tier(text: str) -> Tier:
    head, _, tail = text.partition(":")
    name, equals, rate = head.partition("=")
    if not name or not equals:
        raise ValueError(f"it is not of the form {_FORM}")
    shares = {}
    for entry in filter(None, tail.split(",")):
        part, _, share = entry.partition("=")
        if part not in PARTS:
            raise ValueError(f"{part!r} is no part of a step. Parts are {', '.join(PARTS)}")
        shares[part] = _number(share or "1", f"the share of {part}")
        if shares[part] > 1:
            raise ValueError(f"the share of {part} is {shares[part]:g}, and 1 is all of it")
    return Tier(name, 1e9 * _number(rate, "its bandwidth"), shares)


def _number(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise ValueError(f"{what} is {text!r}, and must be a number above 0")
    return value


def tier_uses(step: StepBytes, tiers: Sequence[Tier], seconds: float | None = None) -> tuple[TierUse, ...]:
    """Computes the use of each tier by a step, or by the sum of several.

    Args:
        step: Bytes of the step.
        tiers: The tiers; the first holds what the others leave.
        seconds: Measured time of the step; None if unknown.
    """
    elsewhere = {part: min(1.0, sum(tier.shares.get(part, 0.0) for tier in tiers[1:])) for part in PARTS}
    uses = []
    for number, tier in enumerate(tiers):
        shares = tier.shares if number else {part: 1.0 - share for part, share in elsewhere.items()}
        amount = sum(getattr(step, part) * share for part, share in shares.items())
        used = None if seconds is None else amount / (seconds * tier.bytes_per_s)
        uses.append(TierUse(tier.name, amount, amount / tier.bytes_per_s, used))
    return tuple(uses)


def least_seconds(uses: Sequence[TierUse]) -> tuple[float, float]:
    """Returns the least time of a step if the tiers work concurrently, and if they work in turn."""
    times = [use.least_s for use in uses]
    return max(times), sum(times)
