"""Options of `moe.routers.sinkhorn`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.routers.configs.projection_config import ProjectionConfig
from moe.routing.sinkhorn_rule import SinkhornRule


@dataclass(frozen=True)
class SinkhornConfig(ProjectionConfig):
    """Config of `SinkhornRouter`."""

    name: Literal["sinkhorn"] = "sinkhorn"
    tolerance: float = 1e-4
    """Mean absolute change of the column scalings at which the iteration stops."""
    max_iterations: int = 100
    """Upper bound on iterations; ordinary logits need about 6."""
    check_every: int = 4
    """Iterations between two reads of the tolerance by the host; the result does not depend on it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        SinkhornRule(self.max_iterations, self.tolerance, check_every=self.check_every)
