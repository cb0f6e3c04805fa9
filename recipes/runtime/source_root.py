"""Root folder of this project's code."""

from __future__ import annotations

from pathlib import Path

SOURCE_ROOT = Path(__file__).resolve().parents[2]
"""The folder of ``train.py``, ``conf`` and the packages."""
