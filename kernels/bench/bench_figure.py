"""SVG of bars with their spread, written by hand so that the benchmark needs only torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_ROW, _LEFT, _WIDTH, _RIGHT = 18, 330, 460, 120
_COLOURS = [
    "#31688e",
    "#35b779",
    "#e69f00",
    "#cc79a7",
    "#56b4e9",
    "#666666",
    "#d55e00",
    "#8c6bb1",
    "#b8a100",
    "#7f3b08",
]


@dataclass(frozen=True)
class Bar:
    """One bar of the figure.

    Attributes:
        group: Title of the bars that stand together and share a scale.
        name: Back end; it has the same colour in all groups.
        value: Length of the bar.
        low: Lower end of the spread.
        high: Upper end of the spread.
        label: Text after the bar.
    """

    group: str
    name: str
    value: float
    low: float
    high: float
    label: str


def bars_svg(title: str, bars: Sequence[Bar]) -> str:
    """Returns the figure as SVG; every group is scaled to its own longest spread."""
    groups = list(dict.fromkeys(bar.group for bar in bars))
    names = list(dict.fromkeys(bar.name for bar in bars))
    colour = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    lines = [f'<text x="8" y="20" font-size="14" font-weight="bold">{escape(title)}</text>']
    y = 34
    for group in groups:
        members = [bar for bar in bars if bar.group == group]
        longest = max(max(bar.high, bar.value) for bar in members) or 1.0
        lines.append(f'<text x="8" y="{y + 13}">{escape(group)}</text>')
        for bar in members:
            lines += _bar(bar, y, _WIDTH / longest, colour[bar.name])
            y += _ROW
        y += 8
    width = _LEFT + _WIDTH + _RIGHT
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y + 8}" '
        'font-family="sans-serif" font-size="11">'
    )
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *lines, "</svg>", ""])


def _bar(bar: Bar, y: int, scale: float, colour: str) -> list[str]:
    middle = y + _ROW / 2
    low, high = _LEFT + bar.low * scale, _LEFT + bar.high * scale
    end = _LEFT + max(bar.value, bar.high) * scale + 6
    box = f'x="{_LEFT}" y="{y + 3}" width="{bar.value * scale:.1f}" height="{_ROW - 6}"'
    return [
        f'<text x="{_LEFT - 6}" y="{middle + 4}" text-anchor="end">{escape(bar.name)}</text>',
        f'<rect {box} fill="{colour}"/>',
        f'<path d="M{low:.1f} {middle}H{high:.1f}" stroke="black" stroke-width="1.5"/>',
        f'<text x="{end:.1f}" y="{middle + 4}">{escape(bar.label)}</text>',
    ]
