"""What routers that balance by assignment have in common: one linear map, and no balance loss.

Letters: T tokens, D model width, E experts, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Generator, Tensor, nn

from moe.routers.base import Router, RouterConfig


@dataclass(frozen=True)
class AssignedConfig(RouterConfig):
    """Config that every router of this kind has. There is no balance loss to set: assignment replaces it."""

    top_k: int = 2
    """Experts a token."""
    init_std: float = 0.02
    """Standard deviation of the initial router weights."""

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: a token needs at least one expert. Set it to 1 or more.")
        if self.init_std <= 0:
            raise ValueError(
                f"init_std={self.init_std}: a router of zeros cannot tell experts apart. "
                "Set it above 0; 0.02 is usual."
            )


AssignedConfigT = TypeVar("AssignedConfigT", bound=AssignedConfig)


class AssignedRouter(Router[AssignedConfigT], Generic[AssignedConfigT]):
    """A linear router whose arithmetic is at least fp32, whatever the model's dtype is.

    Attributes:
        weight_ED: ``[E, D]``.
    """

    def __init__(self, config: AssignedConfigT, model_width: int, num_experts: int) -> None:
        super().__init__(config, model_width, num_experts)
        self.weight_ED = nn.Parameter(torch.empty(num_experts, model_width))
        self.reset_parameters()

    @classmethod
    def check(cls, config: AssignedConfigT, num_experts: int) -> str | None:
        """A token cannot go to more experts than there are."""
        if config.top_k > num_experts:
            return (
                f"a token cannot use more experts than the {num_experts} of upcycle.num_experts. "
                f"Set router.top_k to {num_experts} or less, or raise upcycle.num_experts"
            )
        return None

    @property
    def top_k(self) -> int:
        """K."""
        return self.config.top_k

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Normal with ``init_std``."""
        nn.init.normal_(self.weight_ED, std=self.config.init_std, generator=generator)

    def logits(self, x_TD: Tensor) -> Tensor:
        """``[T, E]`` logits in at least fp32; call it with autocast off."""
        return linear_logits(x_TD, self.weight_ED)


def linear_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """``[T, E]``: ``x W^T`` in at least fp32; call it with autocast off."""
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    return x_TD.to(dtype) @ weight_ED.to(dtype).t()
