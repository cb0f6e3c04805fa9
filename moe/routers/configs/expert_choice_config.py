"""Options of `moe.routers.expert_choice`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.routers.configs.projection_config import ProjectionConfig


@dataclass(frozen=True)
class ExpertChoiceConfig(ProjectionConfig):
    """Config of `ExpertChoiceRouter`. ``top_k`` is c: an expert takes ceil(c T / E) tokens."""

    name: Literal["expert_choice"] = "expert_choice"
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Score function over the logits; softmax runs over the experts of a token."""
    scope: Literal["micro_batch", "sequence"] = "micro_batch"
    """Tokens that an expert chooses from: a rank's whole micro-batch, or each sequence by itself."""
    renormalise: bool = False
    """Divide a token's scores by their sum over the experts that took it; the paper does not."""
