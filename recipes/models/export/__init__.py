"""Export formats for trained models, found by being defined in a module of this package."""

from __future__ import annotations

from moe.registry import discover
from recipes.models.export.base import Exporter
from recipes.models.export.spec import ModelSpec

__all__ = ["Exporter", "choose_exporter", "exporters"]


def exporters() -> dict[str, Exporter]:
    """Returns all formats by name."""
    return {name: cls() for name, cls in discover(__name__, Exporter).items()}


def choose_exporter(spec: ModelSpec) -> tuple[Exporter, list[str]]:
    """Chooses a format that holds the model exactly, a native one if there is one.

    Returns:
        The exporter; if it is not native, also the reason against each native one for this type of model.
    """
    family = spec.read.model_type
    fitting = [e for e in exporters().values() if not e.models or family in e.models]
    unsupported_reasons = []
    for exporter in sorted(fitting, key=lambda exporter: not exporter.is_native):
        unsupported_reason = exporter.unsupported_reason(spec)
        if unsupported_reason is None:
            none = f"no class of transformers holds MoE layers in a model of {family}"
            return exporter, [] if exporter.is_native else unsupported_reasons or [none]
        unsupported_reasons.append(unsupported_reason)
    raise AssertionError(f"no format holds the model: {unsupported_reasons}")
