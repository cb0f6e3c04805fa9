"""What the contract tests of routers share: tokens, contexts, and what a sound routing is.

Letters: T tokens, D model width, E experts, K slots a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe.routers.base import Router
from moe.routers.configs import RouterConfig
from moe.types import LayerContext, Routing
from tests.grid import each
from tests.moe.routers.router_case import EXCUSES
from tests.moe.routers.routing_cases import (
    ROUTER_CONFIGS,
    batch_fields,
    label,
    make_context,
    router_case,
)

T, D, E = 23, 6, 4
every_config = each("config", ROUTER_CONFIGS, ids=label)


def tokens(seed: int = 5, num: int = T) -> Tensor:
    """``[num, D]`` random tokens."""
    return torch.randn(num, D, generator=torch.Generator().manual_seed(seed))


def batch_context(
    router: Router[Any], num: int, order_T: Tensor | None = None, **fields: Any
) -> LayerContext:
    """The context of a batch of one sequence; with an order, what belongs to the tokens is picked by it."""
    given = batch_fields(num if order_T is None else T, router.num_experts) | fields
    if order_T is not None:
        given["token_ids"] = given["token_ids"][:, order_T]
        given["keys"] = {name: key[:, order_T] for name, key in given["keys"].items()}
    return make_context(**given)


def route(router: Router[Any], x_TD: Tensor, order_T: Tensor | None = None, **fields: Any) -> Routing:
    """Routes them in the context of their batch."""
    torch.manual_seed(0)  # for routers that draw noise
    return router(x_TD, batch_context(router, len(x_TD), order_T, **fields))


def used_slots(routing: Routing) -> Tensor:
    """``[T, K]`` bool."""
    if routing.slot_mask_TK is None:
        return torch.ones_like(routing.expert_ids_TK, dtype=torch.bool)
    return routing.slot_mask_TK


def dense_weights(routing: Routing) -> Tensor:
    """``[T, E]`` combine weight of each expert; NaN where an expert is not used."""
    used_TK, E = used_slots(routing), routing.num_experts
    dense_TE = torch.full((len(used_TK), E + 1), float("nan"), dtype=torch.float64)
    ids_TK = routing.expert_ids_TK.masked_fill(~used_TK, E)
    return dense_TE.scatter_(1, ids_TK, routing.weights_TK.detach().double())[:, :E]


def is_excused(config: RouterConfig, *properties: str) -> bool:
    """Whether the router says that one of these properties is not its own."""
    assert set(properties) <= EXCUSES.keys()
    return bool(router_case(config.name).excused.keys() & set(properties))


def state_of(router: Router[Any]) -> dict[str, Tensor]:
    """A copy of what is saved with the model."""
    return {name: value.clone() for name, value in router.state_dict().items()}


def train_step(
    router: Router[Any], parts: list[Tensor], micro_batches: list[int] | None = None, **fields: Any
) -> dict[str, Tensor]:
    """Forward passes of the micro-batches in an order, then what the optimizer step changes."""
    order = list(range(len(parts))) if micro_batches is None else micro_batches
    router.train()
    for micro in order:
        counts = {"micro_batch": micro, "num_micro_batches": len(parts)}
        route(router, parts[micro], **counts, **fields)
    router.after_optimizer_step(make_context(step=1, **fields))
    return state_of(router)


def assert_same(a: Routing, b: Routing, rule: str) -> None:
    """To the last bit, losses included; else the rule that is broken is named."""
    for field in ("expert_ids_TK", "weights_TK", "slot_mask_TK", "scores_TE", "logits_TE"):
        one, other = getattr(a, field), getattr(b, field)
        assert (one is None) == (other is None), f"{rule}: {field} is there in one of two calls"
        assert one is None or torch.equal(one, other), f"{rule}: {field} differs"
    losses = [{n: v.item() for n, v in routing.losses.items()} for routing in (a, b)]
    assert losses[0] == losses[1], f"{rule}: the losses differ"


def assert_same_choice(found_TE: Tensor, expected_TE: Tensor, rule: str) -> None:
    """The same experts; their weights up to the order of sums in a matrix product of another shape."""
    torch.testing.assert_close(
        found_TE, expected_TE, rtol=1e-4, atol=1e-6, equal_nan=True, msg=lambda found: f"{rule}. {found}"
    )


def assert_same_state(found: dict[str, Tensor], expected: dict[str, Tensor], why: str) -> None:
    """To the last bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), f"{why}: {name}"


def assert_sound(router: Router[Any], routing: Routing, num: int, E: int = E) -> None:
    """Shapes, dtypes, ids in range, no expert twice, weights finite and of the sum that is claimed."""
    ids_TK, weights_TK, used_TK = routing.expert_ids_TK, routing.weights_TK, used_slots(routing)
    shapes = f"ids {tuple(ids_TK.shape)}, weights {tuple(weights_TK.shape)} and slots {tuple(used_TK.shape)}"
    same = ids_TK.shape == weights_TK.shape == used_TK.shape
    assert same and len(ids_TK) == num, f"{shapes} are all [T, K], T = {num}"
    assert ids_TK.dtype == torch.int64 and used_TK.dtype == torch.bool, "ids are int64, slot masks bool"
    assert weights_TK.dtype in (torch.float32, torch.float64), f"weights are fp32 or fp64: {weights_TK.dtype}"
    assert routing.num_experts == E, f"num_experts is E = {E}, not {routing.num_experts}"
    assert ((ids_TK >= 0) & (ids_TK < E))[used_TK].all(), f"ids are from 0 to E - 1 = {E - 1}"
    # Also in unused slots: 0 times infinity is not 0 in backward.
    assert weights_TK.isfinite().all(), "weights are finite, those of unused slots too"
    chosen_TE = torch.zeros(num, E + 1).scatter_add_(
        1, ids_TK.masked_fill(~used_TK, E), torch.ones(ids_TK.shape)
    )
    assert (chosen_TE[:, :E] <= 1).all(), "a token meets an expert twice"
    for name in ("scores_TE", "logits_TE"):
        dense_TE = getattr(routing, name)
        assert dense_TE is None or (dense_TE.shape == (num, E) and dense_TE.isfinite().all()), (
            f"{name} is [T, E] and finite, or None"
        )
    if router.weights_sum_to_one and num:
        sums_T = weights_TK.masked_fill(~used_TK, 0).sum(-1)
        # A rounding step for each of the K weights.
        bound = weights_TK.shape[1] * torch.finfo(weights_TK.dtype).eps
        off = float((sums_T - 1).abs().max())
        assert off <= bound, f"weights_sum_to_one is True, and a token's weights sum to 1 +- {off:.2g}"
