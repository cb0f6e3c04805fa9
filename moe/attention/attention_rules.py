"""Config of attention experts, its checks, and the factor on their weights.

Letters: E experts (key-value heads), K experts a token.
"""

from __future__ import annotations

from typing import Any

import torch

from moe.attention.attention_config import AttentionConfig
from moe.attention.routed_attention import by_expert
from moe.errors import Mistake
from moe.routers.base import Router
from moe.routers.configs import RouterConfig
from moe.types import LayerContext, RouterContext
from moe.upcycle.gates import Gates, observe

# Tolerance of weight times factor, where all experts together equal the dense attention.
_TOLERANCE = 1e-6


def router_mistakes(config: AttentionConfig, cls: type[Router[Any]], num_experts: int) -> list[Mistake]:
    """Returns why a router cannot choose among the key-value heads; empty if it can.

    Args:
        config: Config of the attention, which has passed its own check.
        cls: Class of its router.
        num_experts: E.
    """
    unsupported_reason = _kind_unsupported_reason(config.router, cls)
    if unsupported_reason is not None:
        remedy = "Choose a router of single tokens such as one_plus, topk or sigmoid."
        return [Mistake("attention.router.name", config.router.name, unsupported_reason, remedy)]
    if config.scale_factor is None and _balanced_scale(observe(config.router, num_experts)) is None:
        rule = "the sum of this router's weights is unknown, and so is the factor for the heads"
        return [Mistake("attention.scale_factor", None, rule, "Set it, or choose another router.")]
    return []


def _kind_unsupported_reason(config: RouterConfig, cls: type[Router[Any]]) -> str | None:
    """Returns why attention cannot use a kind of router; None if it can."""
    if not cls.is_causal:
        return "a token's heads would depend on later tokens"
    if cls.wrap_dispatcher is not Router.wrap_dispatcher or cls.attach is not Router.attach:
        return "it reads feed-forward experts or averages their inputs"
    if config.needed_keys:
        return "it needs properties of a token that the run does not know"
    return None


def attention_scale(config: AttentionConfig, num_experts: int) -> float:
    """Returns the factor on the weights of a router that `router_mistakes` has accepted."""
    if config.scale_factor is not None:
        return config.scale_factor
    scale = _balanced_scale(observe(config.router, num_experts))
    assert scale is not None, f"router_mistakes rejects {config.router.name}"
    return scale


def _balanced_scale(gates: Gates) -> float | None:
    if gates.alike is not None:
        return 1.0 / gates.alike
    return gates.top_k / gates.total if gates.total else None


@torch.no_grad()
def counts_all_once(router: Router[Any], scale: float) -> bool:
    """Returns True if every token uses every expert at weight 1, which equals the dense attention.

    Args:
        router: The router, untrained.
        scale: Factor on its weights.
    """
    if router.top_k < router.num_experts:
        return False
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(64, router.model_width, generator=generator)
    training = router.training
    routing = router.eval()(x_TD, LayerContext(RouterContext(token_ids=torch.arange(64)[None]), 0))
    router.train(training)
    weights_TE, chosen_TE = by_expert(routing)
    return bool(chosen_TE.all()) and bool((weights_TE * scale - 1).abs().max() <= _TOLERANCE)
