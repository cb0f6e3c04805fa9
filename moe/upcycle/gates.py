"""Combine weights of a router as a method sees them: their sum, and whether ties hold.

They are observed on a small router of the same config, so that methods need not know routers by name.

Letters: T tokens, D model width, E experts, G experts of a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe.routers import router_class
from moe.routers.base import Router
from moe.routers.configs import RouterConfig
from moe.types import LayerContext, RouterContext

# Sizes of the small router. Rows with deviation 1/sqrt(D) give logits with deviation 1: clear choices without
# saturation.
_WIDTH = 16
_TOKENS = 64
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Gates:
    """Weights that a router gives to the experts of a token.

    Attributes:
        top_k: Experts per token; the mean, where it varies.
        total: Sum of their weights: every token's if `constant`, else that of a router of zeros. None if
            unknown, 0, or different from token to token even then.
        constant: True if the sum is the same for all tokens and router rows.
        has_rows: True if the router has a row for each expert, which a method may set.
        alike: The common weight of all used experts, at least until training changes the router; None if
            their weights differ.
    """

    top_k: int
    total: float | None
    constant: bool
    has_rows: bool
    alike: float | None = None

    @property
    def weight_sum(self) -> float:
        """`total`, once a method's check has ensured that it is known."""
        assert self.total is not None, "the method's check rejects routers whose sum is unknown"
        return self.total


@torch.no_grad()
def observe(config: RouterConfig, num_experts: int) -> Gates:
    """Observes the gates of the routers of a config.

    Args:
        config: Config of the router, which has passed its own check.
        num_experts: E.
    """
    with _small_router(config, num_experts) as router:
        sums_to_one = router.weights_sum_to_one
        rows_ED = router.rows_ED()
        if router.weighs_one:
            return Gates(router.top_k, float(router.top_k), True, rows_ED is not None, 1.0)
        if rows_ED is None:
            return Gates(router.top_k, 1.0 if sums_to_one else None, sums_to_one, False)
        weights_TE = _weights(router, _tokens())
        total = 1.0 if sums_to_one else _total(router)
        constant = total is not None
        if not constant:
            rows_ED.zero_()
            total = _one_value(_weights(router, _tokens()).sum(-1))
        return Gates(router.top_k, total or None, constant, True, _one_value(weights_TE))


def _total(router: Router[Any]) -> float | None:
    """Returns the sum of a token's weights if all tokens have the same, even equal tokens; else None."""
    tokens = _tokens()
    sums = [
        _weights(router, x_TD, training).sum(-1)
        for x_TD in (tokens, tokens[:1].expand_as(tokens))
        for training in (False, True)
    ]
    return _one_value(torch.cat(sums))


def _one_value(values: Tensor) -> float | None:
    first = float(values.flatten()[0])
    return first if bool((values - first).abs().max() <= _TOLERANCE * abs(first)) else None


@torch.no_grad()
def keeps_groups(config: RouterConfig, num_experts: int, group_size: int, training: bool) -> bool:
    """Returns True if every token uses whole groups of experts when the rows of a group are equal.

    Args:
        config: Config of a router with rows, which has passed its own check.
        num_experts: E.
        group_size: G, a divisor of E.
        training: Puts the router into training mode, in which some add noise or even out the load.
    """
    with _small_router(config, num_experts) as router:
        rows_ED = router.rows_ED()
        assert rows_ED is not None, f"{router.name} has no rows"
        rows_ED.copy_(rows_ED[: num_experts // group_size].repeat_interleave(group_size, dim=0))
        weights_TGN = _weights(router, _tokens(), training).view(_TOKENS, -1, group_size)
        spread = weights_TGN.amax(-1) - weights_TGN.amin(-1)
        return bool(spread.max() <= 1e-4 * weights_TGN.abs().max())


@contextmanager
def _small_router(config: RouterConfig, num_experts: int) -> Iterator[Router[Any]]:
    # Routers draw their parameters at construction, which must not change the caller's random state.
    with torch.random.fork_rng(devices=()), torch.device("cpu"):
        router = router_class(config.name)(config, _WIDTH, num_experts)
        router.reset_parameters(torch.Generator().manual_seed(0))
        router.double()
        if (rows_ED := router.rows_ED()) is not None:
            rows_ED.normal_(std=_WIDTH**-0.5, generator=torch.Generator().manual_seed(1))
        yield router


def _tokens() -> Tensor:
    return torch.randn(_TOKENS, _WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def _weights(router: Router[Any], x_TD: Tensor, training: bool = False) -> Tensor:
    """Returns the ``[T, E]`` weight of every expert for every token; 0 where unused."""
    run = RouterContext(token_ids=torch.arange(len(x_TD))[None])
    routing = router.train(training)(x_TD, LayerContext(run, 0))
    weights_TK, ids_TK, used_TK = routing.weights_TK, routing.expert_ids_TK, routing.slot_mask_TK
    if used_TK is not None:
        weights_TK, ids_TK = weights_TK * used_TK, ids_TK.where(used_TK, 0)
    weights_TE: Tensor = weights_TK.new_zeros(len(weights_TK), routing.num_experts)
    return weights_TE.scatter_add(1, ids_TK, weights_TK)
