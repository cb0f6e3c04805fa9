"""Pages of HTML in one file each: no script, no font, no request of any kind.

The templates escape everything that comes from a run; callers pass plain text.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader

from recipes.runtime.atomic import atomic_write_text
from recipes.tracking.report import canvas, formats
from recipes.tracking.report.colours import DARK, LIGHT, Theme
from recipes.tracking.report.results_table import caveats, cells, headline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMATS = ("count", "size", "loss", "giga", "small", "decimal", "share", "seconds")


@dataclass(frozen=True)
class Picture:
    """Figure for a light and a dark page, as two PNG files.

    Attributes:
        light: PNG on the light background.
        dark: PNG on the dark background.
        alternative: Description for those who cannot see it.
    """

    light: bytes
    dark: bytes
    alternative: str


@dataclass(frozen=True)
class Section:
    """Part of a study's page; everything that is empty is left out.

    Attributes:
        heading: Heading above it.
        bullets: List in a box.
        picture: Figure below the list.
        head: Columns of the table.
        rows: Rows of the table.
        notes: Remarks below the table.
        facts: Table of names and values below the remarks.
        absent: Text of the cells to mute.
    """

    heading: str = ""
    bullets: Sequence[str] = ()
    picture: Picture | None = None
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()
    absent: str = formats.NOT_MEASURED


def draw_picture(draw: Callable[[Theme], Figure | None], alternative: str, path: Path) -> Picture | None:
    """Draws a figure in both themes and writes the light one to ``path``; None where nothing is drawn.

    Raises:
        DiskError: The file cannot be written.
    """
    light, dark = draw(LIGHT), draw(DARK)
    if light is None or dark is None:
        return None
    return Picture(canvas.write_png(light, path), canvas.png(dark), alternative)


def write_page(path: Path, template: str, title: str, **content: Any) -> Path:
    """Fills a template of ``templates/`` and writes the page; returns its path.

    Raises:
        DiskError: The file cannot be written.
    """
    atomic_write_text(path, _environment().get_template(template).render(title=title, **content))
    return path


def write_study(path: Path, title: str, introduction: Sequence[str], sections: Sequence[Section]) -> Path:
    """Writes the page of a study: paragraphs, then sections; returns its path.

    Raises:
        DiskError: The file cannot be written.
    """
    return write_page(path, "study.html.j2", title, introduction=introduction, sections=sections)


@cache
def _environment() -> Environment:
    """Returns the environment of all templates."""
    loader = FileSystemLoader(Path(__file__).with_name("templates"))
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {"light": LIGHT, "dark": DARK}
    environment.filters |= {name: getattr(formats, name) for name in _FORMATS}
    environment.filters |= {"cells": cells, "caveats": caveats, "headline": headline, "repr": repr}
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return environment
