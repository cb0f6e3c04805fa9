"""Options of `moe.upcycle.copies`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.errors import require
from moe.upcycle.configs import UpcycleConfig


@dataclass(frozen=True)
class CopyConfig(UpcycleConfig):
    """Config of `Copy`."""

    name: Literal["copy"] = "copy"
    noise_std: float = 0.0
    """Standard deviation of Gaussian noise on each copy, relative to the standard deviation of the weight
    matrix. 0 keeps the copies identical and the function exact."""
    permute: bool = False
    """Permute each copy's neurons. The function stays the same, but methods that compare or merge experts
    neuron by neuron then see different experts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self, (self.noise_std >= 0, "noise_std", "a deviation is not negative", "Set it to 0 or more.")
        )
