"""Options of `moe.upcycle.llama_moe`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.errors import Mistake, require
from moe.routers.configs import RouterConfig
from moe.types import unless
from moe.upcycle.configs import UpcycleConfig
from moe.upcycle.dense_shape import FFNShape, division_mistakes

Split = Literal["random", "cluster", "coactivation", "gradient", "sharing_inner", "sharing_inter"]


@dataclass(frozen=True)
class LlamaMoEConfig(UpcycleConfig):
    """Config of `LlamaMoE`."""

    name: Literal["llama_moe"] = "llama_moe"
    split: Split = "random"
    """``random``; ``cluster``: balanced k-means of the normalised up rows; ``coactivation``: balanced
    partition of the graph of neurons that are active together; ``gradient``: by importance for clusters of
    tokens, each neuron once; ``sharing_inner``: every expert takes its most important neurons, some twice and
    some never; ``sharing_inter``: neurons that most experts would take are shared (taken in rounds, see
    `moe.upcycle.neuron_split.most_wanted`), the rest as ``gradient``."""
    num_shared: int = 1
    """Width of the shared expert in widths of a routed one, with ``sharing_inter``."""
    cluster_tokens: int = 8192
    """Tokens that are clustered, where importance decides."""
    scale_factor: float | None = None
    """Factor on the routed experts' output, folded into their down projections; None takes ``E / K`` like the
    release. If weights sum to 1, each of K experts then weighs about E / K^2; a factor of K makes it 1."""

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
                self.num_shared >= 1,
                "num_shared",
                "sharing_inter shares at least one",
                "Set 1 or more, or another split.",
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
        return self.num_experts + (self.num_shared if self.split == "sharing_inter" else 0)

    def idle(self) -> dict[str, str]:
        """Returns the options without effect; see `Config.idle`."""
        measured = self.split in ("gradient", "sharing_inner", "sharing_inter")
        shares = self.split == "sharing_inter"
        return unless(shares, "only split=sharing_inter shares", "num_shared") | unless(
            measured, f"split={self.split} asks for no importance", "cluster_tokens"
        )
