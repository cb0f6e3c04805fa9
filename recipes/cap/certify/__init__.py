"""Certifies that programs which serve an exported mixture compute what its trainer does, expert by expert."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recipes.cap.certify.base import Consumer


def consumer_classes() -> dict[str, type[Consumer]]:
    """Returns every program that certifies exports, by its name: one file ``NAME_consumer.py`` each."""
    from moe.registry import discover
    from recipes.cap.certify.base import Consumer

    return discover(__name__, Consumer, ending="_consumer")
