"""Formats for trained models, found by being in a module of this package."""

from __future__ import annotations

from moe.discovery import discover
from recipes.hosts.exporters.base import Exporter
from recipes.hosts.huggingface import HuggingFaceHost

__all__ = ["Exporter", "choose_exporter"]


def choose_exporter(host: HuggingFaceHost) -> tuple[Exporter, list[str]]:
    """The best format that holds the host exactly: a native one if there is one.

    Returns:
        The exporter, and why each native format was refused.
    """
    exporters: list[Exporter] = [cls() for cls in discover(__name__, Exporter).values()]
    refusals = []
    for exporter in sorted(exporters, key=lambda exporter: not exporter.is_native):
        refusal = exporter.refusal(host)
        if refusal is None:
            return exporter, refusals
        refusals.append(refusal)
    raise AssertionError(f"no format holds the host: {refusals}")
