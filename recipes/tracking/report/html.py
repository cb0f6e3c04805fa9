"""The report as one HTML file that needs nothing else: no script, no font, no request of any kind.

Everything that comes from a run is escaped here; callers pass plain text.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from recipes.tracking.report.colours import DARK, LIGHT, Theme

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_STYLE = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: 1.65rem; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.12rem; margin: 44px 0 12px; }
p { margin: 0 0 12px; }
.meta { color: var(--muted); font-size: .92rem; }
.lead { font-size: 1.12rem; margin: 20px 0 0; }
.note { color: var(--muted); font-size: .92rem; }
.box { border: 1px solid var(--line); border-radius: 8px; background: var(--card); padding: 14px 18px; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; background: var(--card); }
th:first-child { padding-left: 18px; } td:last-child, th:last-child { padding-right: 18px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 10px; text-align: right; border-top: 1px solid var(--line); vertical-align: bottom; }
thead th { border-top: 0; color: var(--muted); font-weight: 600; font-size: .82rem; line-height: 1.3; }
tbody th { font-weight: 600; white-space: nowrap; }
td { white-space: nowrap; }
th:first-child, .facts td { text-align: left; }
.facts th { width: 42%; color: var(--muted); font-weight: 400; white-space: normal; }
.facts td { white-space: normal; overflow-wrap: anywhere; }
.facts tr:first-child > * { border-top: 0; }
.none { color: var(--muted); font-style: italic; }
figure { margin: 0; padding: 12px; }
figure img { display: block; width: 100%; min-width: 640px; height: auto; }
.scroll + .note { margin-top: 16px; }
.scroll + .scroll { margin-top: 16px; }
.box ul { margin: 0; padding-left: 18px; }
.box p:last-child { margin: 0; }
pre { margin: 0; padding: 14px 18px; overflow-x: auto;
  font: .86rem/1.5 ui-monospace, Menlo, Consolas, monospace; }
details > summary { cursor: pointer; padding: 10px 18px; }
details > pre { border-top: 1px solid var(--line); }
@media print { h2 { break-after: avoid; } .scroll, .box { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Picture:
    """A figure for a light and a dark page, as PNG files.

    Attributes:
        light: On the light background.
        dark: On the dark background.
        alternative: What it shows, for those who cannot see it.
    """

    light: bytes
    dark: bytes
    alternative: str


def page(title: str, body: Sequence[str]) -> str:
    """The whole document.

    Args:
        title: Plain text.
        body: Pieces made by the functions of this file.
    """
    head = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{escape(title)}</title>\n'
        f"<style>{_variables()}{_STYLE}</style>\n</head>\n<body>\n<main>\n"
    )
    return head + "\n".join(body) + "\n</main>\n</body>\n</html>\n"


def title(text: str) -> str:
    """The title of the page."""
    return f"<h1>{escape(text)}</h1>"


def heading(text: str) -> str:
    """The heading of a section."""
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph; ``kind`` is ``lead``, ``meta``, ``note`` or nothing."""
    return f'<p class="{escape(kind)}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def box(pieces: Sequence[str]) -> str:
    """Pieces of HTML in a frame."""
    return f'<div class="box">{"".join(pieces)}</div>'


def bullets(texts: Sequence[str]) -> str:
    """A list of plain texts."""
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], absent: str) -> str:
    """A table of figures: names on the left, numbers on the right. Cells equal to ``absent`` are muted."""
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(_cell(text, absent) for text in row[1:])}</tr>'
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>'


def facts(pairs: Sequence[tuple[str, str]], absent: str) -> str:
    """A table of names and values."""
    rows = "".join(f'<tr><th scope="row">{escape(k)}</th>{_cell(v, absent)}</tr>' for k, v in pairs)
    return f'<div class="scroll"><table class="facts"><tbody>{rows}</tbody></table></div>'


def figure(picture: Picture) -> str:
    """A figure that follows the reader's light or dark setting."""
    light, dark = (base64.b64encode(data).decode() for data in (picture.light, picture.dark))
    return (
        '<figure class="scroll"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,{dark}">'
        f'<img src="data:image/png;base64,{light}" alt="{escape(picture.alternative)}">'
        "</picture></figure>"
    )


def code(text: str) -> str:
    """A block of code."""
    return f'<div class="scroll"><pre><code>{escape(text)}</code></pre></div>'


def folded(summary: str, text: str) -> str:
    """A block of text behind a line that opens it."""
    return f'<details class="scroll"><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>'


def _cell(text: str, absent: str) -> str:
    return f'<td class="none">{escape(text)}</td>' if text == absent else f"<td>{escape(text)}</td>"


def _variables() -> str:
    """The themes as CSS variables."""
    light = _theme_variables(LIGHT, page="#f6f7f9")
    dark = _theme_variables(DARK, page="#0f1216")
    return f":root {{ {light} }} @media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"


def _theme_variables(theme: Theme, page: str) -> str:
    return (
        f"color-scheme: {theme.name}; --page: {page}; --card: {theme.background}; "
        f"--text: {theme.text}; --muted: {theme.muted}; --line: {theme.grid};"
    )
