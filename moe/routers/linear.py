"""What routers with one linear map from tokens to logits have in common: config, weights, balance losses.

Letters: T tokens, D model width, E experts, K experts a token, N of either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Generator, Tensor, nn

from moe.balance import BalanceScope, balance_loss, count_load, z_loss
from moe.routers.base import Router, RouterConfig
from moe.step_sums import StepSums
from moe.types import LayerContext


@dataclass(frozen=True)
class LinearRouterConfig(RouterConfig):
    """Config that every linear router has."""

    top_k: int = 2
    """Experts a token."""
    init_std: float = 0.02
    """Standard deviation of the initial router weights."""
    balance_coef: float = 0.01
    """Coefficient of the Switch balance loss; 0 leaves it out."""
    balance_scope: BalanceScope = "micro_batch"
    """Over which tokens load is counted: the micro-batch of all ranks, each sequence by itself, or all
    micro-batches of the step so far."""
    z_coef: float = 0.0
    """Coefficient of the router z-loss; 0 leaves it out."""

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: a token needs at least one expert. Set it to 1 or more.")
        if self.init_std <= 0:
            raise ValueError(
                f"init_std={self.init_std}: a router of zeros sends every token to the first experts. "
                "Set it above 0; 0.02 is usual."
            )
        for name in ("balance_coef", "z_coef"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"{name}={getattr(self, name)}: a coefficient is not negative. Set it to 0 or more."
                )


LinearConfigT = TypeVar("LinearConfigT", bound=LinearRouterConfig)


class LinearRouter(Router[LinearConfigT], Generic[LinearConfigT]):
    """A router whose logits are ``x W^T``. Its arithmetic is at least fp32, whatever the model's dtype is.

    Attributes:
        weight_ED: ``[E, D]``.
    """

    def __init__(self, config: LinearConfigT, model_width: int, num_experts: int) -> None:
        super().__init__(config, model_width, num_experts)
        self.weight_ED = nn.Parameter(torch.empty(num_experts, model_width))
        self._load_history = StepSums()
        self.reset_parameters()

    @classmethod
    def check(cls, config: LinearConfigT, num_experts: int) -> str | None:
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
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        return x_TD.to(dtype) @ self.weight_ED.to(dtype).t()

    def balance_losses(
        self, logits_TE: Tensor, probs_TE: Tensor, ids_TK: Tensor, ctx: LayerContext
    ) -> dict[str, Tensor]:
        """The losses that the config asks for, with their coefficients; none in evaluation.

        Args:
            logits_TE: For the z-loss.
            probs_TE: Probabilities that sum to 1 over E; they carry the gradient of the balance loss.
            ids_TK: The chosen experts.
            ctx: For padding, ranks, and the shape of the batch.
        """
        if not self.training:
            return {}
        losses: dict[str, Tensor] = {}
        config, mask_T = self.config, ctx.token_mask_T(len(ids_TK))
        if config.balance_coef:
            value = balance_loss(config.balance_scope, probs_TE, ids_TK, ctx, self._load_history)
            losses["balance"] = config.balance_coef * value
        if config.z_coef:
            load = count_load(ids_TK, self.num_experts, mask_T, ctx.run.group)
            losses["z"] = config.z_coef * z_loss(logits_TE, load.tokens_per_rank, mask_T)
        return losses
