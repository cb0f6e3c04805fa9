"""Options of `moe.upcycle.partition`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.errors import Mistake, require
from moe.routers.configs import RouterConfig
from moe.upcycle.configs import UpcycleConfig
from moe.upcycle.dense_shape import FFNShape, division_mistakes


@dataclass(frozen=True)
class PartitionConfig(UpcycleConfig):
    """Config of `Partition`."""

    name: Literal["partition"] = "partition"
    split: Literal["random", "contiguous"] = "random"
    """Division of the neurons: at random, or in runs."""
    scale_factor: float | None = None
    """Factor on the experts' output, folded into their down projections; None takes ``E / K`` like LLaMA-MoE.
    If weights sum to 1, each of K experts then weighs about E / K^2; a factor of K makes it 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            (
                self.scale_factor is None or self.scale_factor > 0,
                "scale_factor",
                "experts that count nothing cannot learn",
                "Set it above 0.",
            ),
        )

    def check(self, router: RouterConfig, shape: FFNShape | None) -> list[Mistake]:
        """Requires experts of one width."""
        return division_mistakes(shape, self.num_experts, "num_experts", self.num_experts, "Set a divisor.")
