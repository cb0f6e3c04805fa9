"""Colours of the report: a diverging scale for expert load, and two themes.

Letters: L layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# An expert without tokens is deep blue, one with its fair share is pale, an overloaded one is deep red.
DIVERGING_STOPS = ("#1b4a86", "#4a86bf", "#a9cce3", "#f6f4ef", "#f3bf9b", "#d9694c", "#99202e")


@dataclass(frozen=True)
class Theme:
    """Colours of a figure; the page uses the same ones.

    Attributes:
        name: ``light`` or ``dark``.
        background: Behind everything.
        text: Labels and titles.
        muted: Ticks, notes and axes.
        grid: Grid lines.
        dense: The dense model.
        cpt: The dense model trained on.
        moe: The upcycled model.
    """

    name: str
    background: str
    text: str
    muted: str
    grid: str
    dense: str
    cpt: str
    moe: str

    def of(self, model: str) -> str:
        """Returns the colour of ``dense``, ``cpt`` or ``moe``, and that of the text for any other stage."""
        return {"dense": self.dense, "cpt": self.cpt, "moe": self.moe}.get(model, self.text)


LIGHT = Theme("light", "#ffffff", "#1c2430", "#667080", "#e6e9ee", "#5f6b7a", "#b7691a", "#1f62b8")
DARK = Theme("dark", "#171b21", "#e4e8ee", "#97a1b0", "#2a313b", "#a3adba", "#e39a4c", "#6ba6f2")


def load_image(load_LE: NDArray[np.float64], cell: int | None = None) -> NDArray[np.uint8]:
    """Paints expert load as an RGB picture: a row of cells for each layer, a column for each expert.

    The scale is fixed, from 0 over 1 (the uniform share, pale) to 2 and more times the uniform share, so
    that pictures of different steps compare. NaN is grey.

    Args:
        load_LE: Share of the routed slots; each row sums to 1.
        cell: Side of a cell, pixels; None keeps the picture about 1,000 pixels wide at most.
    """
    relative_LE = np.clip(np.asarray(load_LE, dtype=np.float64) * np.shape(load_LE)[1] / 2, 0.0, 1.0)
    stops = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in DIVERGING_STOPS], dtype=np.float64)
    places = np.linspace(0.0, 1.0, len(stops))
    known_LE = np.nan_to_num(relative_LE, nan=0.5)
    channels = [np.interp(known_LE, places, stops[:, i]) for i in range(3)]
    picture = np.where(np.isnan(relative_LE)[..., None], 128.0, np.stack(channels, axis=-1))
    pixels: NDArray[np.uint8] = np.round(picture).astype(np.uint8)
    cell = cell or max(2, min(16, 1024 // max(pixels.shape[1], 1)))
    return pixels.repeat(cell, axis=0).repeat(cell, axis=1)
