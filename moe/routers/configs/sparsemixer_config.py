"""Options of `moe.routers.sparsemixer`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.errors import require
from moe.routers.configs.linear_config import LinearRouterConfig


@dataclass(frozen=True)
class SparseMixerConfig(LinearRouterConfig):
    """Config of `SparseMixerRouter`."""

    name: Literal["sparsemixer"] = "sparsemixer"
    version: Literal["v1", "v2"] = "v2"
    """``v1``: one expert, mid-point. ``v2``: one or two, Heun."""
    jitter: float = 0.1
    """An expert is not sampled when its logit is below the best by more than twice this share of the larger
    magnitude of the two."""
    noise_seed: int = 0
    """Seed of the draws; conf/router follows the run's seed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        most = 1 if self.version == "v1" else 2
        remedy = f"Set router.top_k={most}" + (" or router.version=v2." if most == 1 else ".")
        require(
            self,
            (
                self.top_k <= most,
                "top_k",
                f"SparseMixer {self.version} samples at most {most} a token",
                remedy,
            ),
            (
                self.jitter > 0,
                "jitter",
                "without it only the best expert is left to sample",
                "Set it above 0.",
            ),
        )
