"""Options of `moe.routers.gshard`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.errors import require
from moe.routers.configs.linear_config import LinearRouterConfig
from moe.types import unless


@dataclass(frozen=True)
class GShardConfig(LinearRouterConfig):
    """Config of `GShardRouter`. The balance loss counts first choices only."""

    name: Literal["gshard"] = "gshard"
    second: Literal["paper", "mesh_tf", "sampled", "always"] = "paper"
    """Rule for the second expert in training: the second best with probability 2 g2 (``paper``) or
    min(1, 5 g2) (``mesh_tf``); always one sampled from the softmax without the first (``sampled``, fairseq);
    always the second best (``always``). Evaluation always takes the two best."""
    noise_seed: int = 0
    """Seed of the draws; conf/router follows the run's seed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            (
                self.top_k == 2,
                "top_k",
                "GShard's routing has a first and a second expert",
                "Set router.top_k=2, or use router=topk or router=switch.",
            ),
        )

    def idle(self) -> dict[str, str]:
        """Returns the options without effect; see `Config.idle`."""
        return super().idle() | unless(self.second != "always", "second=always draws nothing", "noise_seed")
