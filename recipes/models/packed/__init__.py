"""Formats of quantised checkpoints that are dequantised exactly: one file each."""

from __future__ import annotations

from moe.registry import discover
from recipes.models.packed.base import PackedFormat, Unpacked

__all__ = ["PackedFormat", "Unpacked", "packed_formats"]


def packed_formats() -> dict[str, PackedFormat]:
    """Returns every format by the ``quant_method`` that configs call it."""
    return {name: cls() for name, cls in discover(__name__, PackedFormat, ending="_format").items()}
