"""Pictures take longer than all else on a page: tests that do not look at them get one dot."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


@pytest.fixture
def rendered() -> None:
    """For tests that look at pictures: figures become PNG files as they do for a user."""


@pytest.fixture(autouse=True)
def _dots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made, and not rendered. Those of runs that whole modules share are."""
    if "rendered" not in request.fixturenames:
        from recipes.tracking.report import canvas

        dot = base64.b64decode(_DOT)

        def png(figure: Figure) -> bytes:
            assert figure.get_axes(), "there is nothing in it"
            return dot

        monkeypatch.setattr(canvas, "png", png)
