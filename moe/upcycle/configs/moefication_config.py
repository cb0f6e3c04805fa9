"""Options of `moe.upcycle.moefication`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.upcycle.configs import UpcycleConfig


@dataclass(frozen=True)
class MoEficationConfig(UpcycleConfig):
    """Config of `MoEfication`."""

    name: Literal["moefication"] = "moefication"
    split: Literal["cluster", "coactivation"] = "coactivation"
    """Balanced k-means of the normalised up rows, or a balanced partition of the graph of neurons that are
    active for the same tokens."""
