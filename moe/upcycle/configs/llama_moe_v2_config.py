"""Options of `moe.upcycle.llama_moe_v2`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from moe.errors import Mistake, require
from moe.routers.configs import RouterConfig
from moe.types import unless
from moe.upcycle.configs import UpcycleConfig
from moe.upcycle.dense_shape import FFNShape, division_mistakes


@dataclass(frozen=True)
class LlamaMoEV2Config(UpcycleConfig):
    """Config of `LlamaMoEV2`."""

    starts_router: ClassVar[bool] = True
    name: Literal["llama_moe_v2"] = "llama_moe_v2"
    num_experts: int = 7
    """Routed experts."""
    layers: str | list[int] = "inner:1"
    """Layers that become MoE layers; the release leaves the first and the last dense."""
    residual: bool = True
    """Make a shared expert beside the routed ones, all by importance; false cuts the dense network into runs
    of neurons."""
    router_rows: Literal["centroids", "raw_centroids", "drawn"] = "centroids"
    """``centroids`` divided by their mean squared length, so that a logit is about 1 at its own centroid;
    ``raw_centroids`` as the release: the choice is the same, and its weights are nearly 0 and 1."""
    cluster_tokens: int = 8192
    """Tokens that are clustered."""
    align_outputs: bool = False
    """Rescale each layer's outputs to the deviation of the dense network's, channel by channel, on the tokens
    of the equivalence check."""
    scale_factor: float | None = None
    """Factor on the routed experts' output, folded into their down projections. None takes K with a shared
    expert (1 for the release's top-1), so that experts weigh about 1, and E / K without."""

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
            (
                self.cluster_tokens >= self.num_experts,
                "cluster_tokens",
                "every cluster needs a token",
                "Set it to num_experts or more; thousands are usual.",
            ),
        )

    def check(self, router: RouterConfig, shape: FFNShape | None) -> list[Mistake]:
        """Requires parts of one width."""
        return division_mistakes(
            shape, self.num_parts, "num_experts", self.num_experts, "Set another number."
        )

    @property
    def num_parts(self) -> int:
        """Equal parts that the dense neurons are cut into."""
        return self.num_experts + int(self.residual)

    @property
    def sets_rows(self) -> bool:
        """True if the router begins at centroids."""
        return self.residual and self.router_rows != "drawn"

    def idle(self) -> dict[str, str]:
        """Returns the options without effect; see `Config.idle`."""
        return unless(self.residual, "residual=false cuts without measuring", "router_rows", "cluster_tokens")
