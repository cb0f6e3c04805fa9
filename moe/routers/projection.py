"""What routers have in common whose logits are one linear map and whose balance is no Switch loss.

Letters: T tokens, D model width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Generator, Tensor, nn

from moe.errors import require
from moe.routers.base import Router, RouterConfig


@dataclass(frozen=True)
class ProjectionConfig(RouterConfig):
    """Config that every router with a projection has."""

    top_k: int = 2
    """Experts a token, as a mean where it varies."""
    init_std: float = 0.02
    """Standard deviation of the initial router weights."""

    def __post_init__(self) -> None:
        require(
            self,
            (self.top_k >= 1, "top_k", "a token needs at least one expert", "Set it to 1 or more."),
            (
                self.init_std > 0,
                "init_std",
                "a router of zeros sends every token to the first experts",
                "Set it above 0; 0.02 is usual.",
            ),
        )


ProjectionConfigT = TypeVar("ProjectionConfigT", bound=ProjectionConfig)


class ProjectionRouter(Router[ProjectionConfigT], Generic[ProjectionConfigT]):
    """A router whose logits are ``x W^T``. Its arithmetic is at least fp32, whatever the model's dtype is.

    Attributes:
        weight_ED: ``[E, D]``.
    """

    def __init__(self, config: ProjectionConfigT, model_width: int, num_experts: int) -> None:
        super().__init__(config, model_width, num_experts)
        self.weight_ED = nn.Parameter(torch.empty(num_experts, model_width))

    @property
    def top_k(self) -> int:
        """K."""
        return self.config.top_k

    def rows_ED(self) -> Tensor | None:
        """The projection."""
        return self.weight_ED

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
