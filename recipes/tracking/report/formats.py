"""Numbers as people read them. What was not measured says so."""

from __future__ import annotations

import math
from typing import Any

NOT_MEASURED = "not measured"
_COUNTS = ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k"))
_BYTES = ((2**40, " TiB"), (2**30, " GiB"), (2**20, " MiB"), (2**10, " KiB"))


def number(value: Any) -> float | None:
    """A finite number, or None for everything else (missing, null, NaN, text, true and false)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def count(value: Any) -> str:
    """A count to three digits: ``124 M``, ``1.05 B``."""
    return _scaled(value, _COUNTS)


def size(value: Any) -> str:
    """Bytes to three digits: ``1.25 GiB``."""
    return _scaled(value, _BYTES, " B")


def loss(value: Any) -> str:
    """A loss in nats a token: ``3.2041``."""
    known = number(value)
    return NOT_MEASURED if known is None else f"{known:.4f}"


def difference(value: Any) -> str:
    """A signed difference of losses: ``-0.2104``."""
    known = number(value)
    return NOT_MEASURED if known is None else f"{known:+.4f}"


def giga(value: Any) -> str:
    """A number in units of 10^9, to three digits: ``0.249``."""
    known = number(value)
    return NOT_MEASURED if known is None else _digits(known / 1e9)


def small(value: Any) -> str:
    """A ratio or an error: ``0``, ``0.031``, ``3.1e-07``."""
    known = number(value)
    return NOT_MEASURED if known is None else f"{known:.3g}"


def decimal(value: Any) -> str:
    """A plain number to three decimals: ``0.983``."""
    known = number(value)
    return NOT_MEASURED if known is None else f"{known:.3f}"


def share(value: Any) -> str:
    """A fraction as a percentage: ``31.2 %``."""
    known = number(value)
    return NOT_MEASURED if known is None else f"{_digits(100 * known)} %"


def seconds(value: Any) -> str:
    """A duration: ``0.84 s``, ``12.3 s``, ``4 min 05 s``, ``2 h 03 min``."""
    known = number(value)
    if known is None:
        return NOT_MEASURED
    if known < 59.95:
        return f"{_digits(known)} s"
    minutes, rest = divmod(round(known), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _scaled(value: Any, units: tuple[tuple[float, str], ...], unit: str = "") -> str:
    known = number(value)
    if known is None:
        return NOT_MEASURED
    for scale, name in units:
        if abs(known) >= 0.9995 * scale:
            return _digits(known / scale) + name
    return (f"{known:.0f}" if known == round(known) else _digits(known)) + unit


def _digits(value: float) -> str:
    """Three digits, without an exponent where that is readable."""
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or abs(value) < 1e-4:
        return f"{value:.2e}"
    exponent = int(f"{value:.2e}".partition("e")[2])  # after rounding: 9.999 counts as 10.0
    decimals = max(0, 2 - exponent)
    return f"{value:,.{decimals}f}"
