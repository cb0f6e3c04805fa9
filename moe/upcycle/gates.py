"""What a method may know of a router: what a token's experts weigh together, and whether ties hold.

It is observed on a small router of the same config, so that no method has to know the routers by name.

Letters: T tokens, D model width, E experts, G experts of a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe.routers import Router, RouterConfig, router_class
from moe.types import LayerContext, RouterContext

# Of the small router. Rows of deviation 1/sqrt(D) give logits of deviation 1: clear choices, no saturation.
_WIDTH = 16
_TOKENS = 64
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Gates:
    """The weights that a router gives to the experts of a token.

    Attributes:
        top_k: Experts a token, as a mean where it varies.
        total: Their weights' sum: of every token where `constant`, else of a router of zeros. None where it
            cannot be told, is 0, or differs from token to token even then.
        constant: Whether the sum is the same whatever the token and the router's rows are.
        has_rows: Whether the router has a row for each expert, which a method may set.
        alike: The weight that every expert has that a token uses, where it is one and the same, at least
            until training changes the router; else None.
    """

    top_k: int
    total: float | None
    constant: bool
    has_rows: bool
    alike: float | None = None

    @property
    def weight_sum(self) -> float:
        """`total`, where a method's check has made sure of it."""
        assert self.total is not None, "the method's check refuses routers whose sum cannot be told"
        return self.total


@torch.no_grad()
def observe(config: RouterConfig, num_experts: int) -> Gates:
    """The gates of the routers of a config.

    Args:
        config: Of the router; its own check has passed.
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
    """The sum of every token's weights, where it is one; also of tokens that are all alike."""
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
    """Whether every token uses groups of experts as wholes, where the rows of a group are equal.

    Args:
        config: Of a router with rows; its own check has passed.
        num_experts: E.
        group_size: G, a divisor of E.
        training: Whether the router is in training, where some add noise or even out the load.
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
    # Routers draw their parameters when they are made: the caller's random state is not theirs to change.
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
    """``[T, E]`` what every expert weighs for every token; 0 where it is not used."""
    run = RouterContext(token_ids=torch.arange(len(x_TD))[None])
    routing = router.train(training)(x_TD, LayerContext(run, 0))
    weights_TK, ids_TK, used_TK = routing.weights_TK, routing.expert_ids_TK, routing.slot_mask_TK
    if used_TK is not None:
        weights_TK, ids_TK = weights_TK * used_TK, ids_TK.where(used_TK, 0)
    weights_TE: Tensor = weights_TK.new_zeros(len(weights_TK), routing.num_experts)
    return weights_TE.scatter_add(1, ids_TK, weights_TK)
