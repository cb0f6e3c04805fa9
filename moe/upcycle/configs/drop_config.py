"""Options of `moe.upcycle.drop`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.errors import Mistake, require
from moe.routers.configs import RouterConfig
from moe.types import unless
from moe.upcycle.configs import UpcycleConfig
from moe.upcycle.dense_shape import FFNShape


@dataclass(frozen=True)
class DropConfig(UpcycleConfig):
    """Config of `Drop`."""

    name: Literal["drop"] = "drop"
    ratio: float = 0.5
    """Share of each expert's neurons that change. 0.5 was best in the paper; 1 loses all that was learned."""
    change: Literal["redraw", "noise"] = "redraw"
    """``redraw``: drawn anew. ``noise``: noise of `noise_std` is added, the paper's baseline."""
    noise_std: float = 0.02
    """Standard deviation of the noise."""
    independent: bool = False
    """Change each matrix at neurons of its own, as in the released code and the paper's experiments; false
    is the paper's text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            (0 <= self.ratio <= 1, "ratio", "it is a share of the neurons", "Set it from 0 to 1."),
            (self.noise_std > 0, "noise_std", "there would be no noise", "Set it above 0."),
        )

    def check(self, router: RouterConfig, shape: FFNShape | None) -> list[Mistake]:
        """Requires that the ratio amounts to at least one neuron, or is 0."""
        if shape is None or self.ratio == 0 or int(self.ratio * shape.width):
            return []
        rule = f"of {shape.width} neurons that is not one"
        remedy = "Set a larger share, or 0 for copies."
        return [Mistake("upcycle.ratio", self.ratio, rule, remedy)]

    def idle(self) -> dict[str, str]:
        """Returns the options without effect; see `Config.idle`."""
        return unless(self.change == "noise", "change=redraw adds no noise", "noise_std") | unless(
            self.ratio > 0, "ratio is 0", "change", "noise_std"
        )
