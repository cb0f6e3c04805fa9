"""Options of Sinkhorn iterations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.errors import require

Residual = Literal["column_sums", "column_potentials"]


@dataclass(frozen=True)
class SinkhornRule:
    """Order and stop of the iteration.

    Attributes:
        max_iterations: Upper bound on iterations, each of which updates rows and columns once.
        tolerance: Stops once the residual is at most this; None never stops early and never synchronises.
        residual: ``column_sums``: L2 norm over experts of the plan's column sums minus the wanted ones (row
            sums are exact at that point). ``column_potentials``: mean absolute change of ``exp(v)`` over an
            iteration, which is Megatron-core's rule.
        rows_last: Updates columns first and rows last, so that every token's row sums exactly to its mass;
            False is the reverse, as in Megatron-core.
        check_every: Iterations between two reads of the residual by the host. The result does not depend on
            it: converged potentials stay unchanged on the device.
    """

    max_iterations: int = 100
    tolerance: float | None = 1e-4
    residual: Residual = "column_sums"
    rows_last: bool = True
    check_every: int = 1

    def __post_init__(self) -> None:
        require(
            self,
            *(
                (getattr(self, name) >= 1, name, "it counts iterations", "Set it to 1 or more.")
                for name in ("max_iterations", "check_every")
            ),
            (
                self.tolerance is None or self.tolerance >= 0,
                "tolerance",
                "a residual is not negative",
                "Set it to 0 or more.",
            ),
        )
