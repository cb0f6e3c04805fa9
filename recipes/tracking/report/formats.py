"""Numbers and tables as people read them; missing numbers become `NOT_MEASURED`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

NOT_MEASURED = "not measured"
_COUNTS = ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k"))
_BYTES = ((2**40, " TiB"), (2**30, " GiB"), (2**20, " MiB"), (2**10, " KiB"))


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Aligns a table for the terminal, with a rule below its head.

    Args:
        head: Names of the columns.
        rows: Cells.
        left: Number of leading columns that are aligned to the left; the others are to the right.
    """
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    shown = [
        "  ".join(
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([shown[0], "-" * len(shown[0]), *shown[1:]])


def number(value: Any) -> float | None:
    """Returns a finite number as float, None for all else (missing, null, NaN, text, true and false)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def count(value: Any) -> str:
    """Formats a count with three digits: ``124 M``, ``1.05 B``."""
    return _scaled(value, _COUNTS)


def size(value: Any) -> str:
    """Formats bytes with three digits: ``1.25 GiB``."""
    return _scaled(value, _BYTES, " B")


def loss(value: Any) -> str:
    """Formats a loss in nats per token: ``3.2041``."""
    known = number(value)
    return NOT_MEASURED if known is None else f"{known:.4f}"


def difference(value: Any) -> str:
    """Formats a signed difference of losses: ``-0.2104``."""
    known = number(value)
    return NOT_MEASURED if known is None else f"{known:+.4f}"


def giga(value: Any) -> str:
    """Formats a number in units of 10^9, with three digits: ``0.249``."""
    known = number(value)
    return NOT_MEASURED if known is None else _digits(known / 1e9)


def small(value: Any) -> str:
    """Formats a ratio or an error: ``0``, ``0.031``, ``3.1e-07``."""
    known = number(value)
    return NOT_MEASURED if known is None else f"{known:.3g}"


def decimal(value: Any) -> str:
    """Formats a number with three decimals: ``0.983``."""
    known = number(value)
    return NOT_MEASURED if known is None else f"{known:.3f}"


def share(value: Any) -> str:
    """Formats a fraction as a percentage: ``31.2 %``."""
    known = number(value)
    return NOT_MEASURED if known is None else f"{_digits(100 * known)} %"


def seconds(value: Any) -> str:
    """Formats a duration: ``0.84 s``, ``12.3 s``, ``4 min 05 s``, ``2 h 03 min``."""
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
    """Formats three digits, without an exponent where that is readable."""
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or abs(value) < 1e-4:
        return f"{value:.2e}"
    exponent = int(f"{value:.2e}".partition("e")[2])  # after rounding: 9.999 counts as 10.0
    decimals = max(0, 2 - exponent)
    return f"{value:,.{decimals}f}"
