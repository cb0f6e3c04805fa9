"""Options of `moe.upcycle.shared_dense`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.errors import Mistake, require
from moe.routers.configs import RouterConfig
from moe.types import unless
from moe.upcycle.configs import UpcycleConfig
from moe.upcycle.dense_shape import FFNShape, width_mistakes


@dataclass(frozen=True)
class SharedDenseConfig(UpcycleConfig):
    """Config of `SharedDense`."""

    name: Literal["shared_dense"] = "shared_dense"
    routed: Literal["copies", "drawn"] = "copies"
    """Gate and up projections of the routed experts: dense neurons (all of them, or a random choice for each
    narrower expert), or drawn with `init_std`."""
    expert_width: int | None = None
    """F of a routed expert, at most the dense network's, which None takes."""
    init_std: float = 0.02
    """Standard deviation of drawn weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            (
                self.expert_width is None or self.expert_width >= 1,
                "expert_width",
                "must be at least 1",
                "Or leave it at null.",
            ),
            (self.init_std > 0, "init_std", "experts of zeros stay equal", "Set it above 0; 0.02 is usual."),
        )

    def check(self, router: RouterConfig, shape: FFNShape | None) -> list[Mistake]:
        """Requires routed experts no wider than the dense network."""
        return width_mistakes(shape, self.expert_width)

    def idle(self) -> dict[str, str]:
        """Returns the options without effect; see `Config.idle`."""
        return unless(self.routed == "drawn", "routed=copies draws no weights", "init_std")
