"""Formats for trained models, found by being in a module of this package."""

from __future__ import annotations

from moe.registry import discover
from recipes.models.export.base import Exporter
from recipes.models.export.spec import ModelSpec

__all__ = ["Exporter", "choose_exporter", "exporters"]


def exporters() -> dict[str, Exporter]:
    """Every format by its name."""
    return {name: cls() for name, cls in discover(__name__, Exporter).items()}


def choose_exporter(spec: ModelSpec) -> tuple[Exporter, list[str]]:
    """The best format that holds the model exactly: a native one if there is one.

    Returns:
        The exporter; where it is no native one, why each native one for such hosts was refused.
    """
    family = spec.config.model_type
    fitting = [e for e in exporters().values() if not e.models or family in e.models]
    unsupported_reasons = []
    for exporter in sorted(fitting, key=lambda exporter: not exporter.is_native):
        unsupported_reason = exporter.unsupported_reason(spec)
        if unsupported_reason is None:
            none = f"no class of transformers holds a mixture in a host of {family}"
            return exporter, [] if exporter.is_native else unsupported_reasons or [none]
        unsupported_reasons.append(unsupported_reason)
    raise AssertionError(f"no format holds the model: {unsupported_reasons}")
