"""Options of `moe.routers.relu`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.errors import require
from moe.routers.configs.projection_config import ProjectionConfig

#: Keeps the penalty away from 0, from which no factor recovers it, and from infinity.
_PENALTY_RANGE = (1e-15, 1e15)


@dataclass(frozen=True)
class ReLUConfig(ProjectionConfig):
    """Config of `ReLURouter`. The penalty steers the mean number of experts per token to ``top_k``."""

    name: Literal["relu"] = "relu"
    init_std: float = 0.01
    """Standard deviation of the initial router weights."""
    penalty_init: float = 1e-8
    """Coefficient of the L1 penalty on the gates before the first step (lambda)."""
    penalty_factor: float = 1.2
    """Factor on the penalty after a step with too many experts per token; divisor after any other step."""
    penalty_by_load: bool = True
    """Weigh each expert's penalty by its load, which balances; else penalise all equally."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            (
                _PENALTY_RANGE[0] <= self.penalty_init <= _PENALTY_RANGE[1],
                "penalty_init",
                (
                    f"the penalty is only ever multiplied and divided, within {_PENALTY_RANGE[0]} and "
                    f"{_PENALTY_RANGE[1]}"
                ),
                "Set it to 1e-8.",
            ),
            (
                self.penalty_factor > 1,
                "penalty_factor",
                "a penalty that does not grow makes no gate sparse",
                "Set it above 1; 1.2 is usual.",
            ),
        )
