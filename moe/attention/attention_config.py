"""What a user says of attention experts, what does not fit, and what their weights are multiplied by.

Letters: E experts (key-value heads), K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from moe.attention.routed_attention import by_expert
from moe.errors import Mistake, require
from moe.routers.base import Router, RouterConfig
from moe.types import Config, LayerContext, RouterContext
from moe.upcycle.gates import Gates, observe
from moe.upcycle.layer_choice import LayerChoice, parse_layers

# Of a token's weight times the constant, where all experts together are to be the dense attention.
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class AttentionConfig(Config):
    """Config of `moe.attention.routed_attention.AttentionMoE` in the layers of a dense model."""

    router: RouterConfig
    """Over the key-value heads; ``router.top_k`` of them attend for each token."""
    name: Literal["moe"] = "moe"
    layers: str | list[int] = "all"
    """Which layers' attention is cut into experts; the forms of ``upcycle.layers``."""
    scale_factor: float | None = None
    """What the router's weights are multiplied by. None: so that an expert counts 1 on average, as in the
    dense attention; K where weights sum to 1, and 1 where each is 1."""

    def __post_init__(self) -> None:
        require(
            self,
            (
                self.scale_factor is None or self.scale_factor > 0,
                "scale_factor",
                "heads that count nothing cannot learn",
                "Set it above 0.",
            ),
        )
        parse_layers(self.layers)

    @property
    def layer_choice(self) -> LayerChoice:
        """The parsed `layers`."""
        return parse_layers(self.layers)


def router_mistakes(config: AttentionConfig, cls: type[Router[Any]], num_experts: int) -> list[Mistake]:
    """Why a router cannot choose among so many key-value heads; empty when it can.

    Args:
        config: Of the attention.
        cls: Class of its router.
        num_experts: E.
    """
    unsupported_reason = _kind_unsupported_reason(config.router, cls)
    if unsupported_reason is not None:
        remedy = "Choose a router of single tokens such as one_plus, topk or sigmoid."
        return [Mistake("attention.router.name", config.router.name, unsupported_reason, remedy)]
    top_k = getattr(config.router, "top_k", 1)
    if top_k > num_experts:
        rule = f"the model has {num_experts} key-value heads"
        return [Mistake("attention.router.top_k", top_k, rule, f"Set {num_experts} or less.")]
    found = cls.check(config.router, num_experts)
    if found is not None:
        return [found.under("attention.router")]
    if config.scale_factor is None and _balanced_scale(observe(config.router, num_experts)) is None:
        rule = "what this router's weights sum to is not known, and so not what heads must be multiplied by"
        return [Mistake("attention.scale_factor", None, rule, "Set it, or choose another router.")]
    return []


def _kind_unsupported_reason(config: RouterConfig, cls: type[Router[Any]]) -> str | None:
    """Why attention has no place for a kind of router."""
    if not cls.is_causal:
        return "a token's heads would depend on later tokens"
    if cls.wrap_dispatcher is not Router.wrap_dispatcher or cls.attach is not Router.attach:
        return "it reads or mixes what feed-forward experts are given"
    if cls.needed_keys(config):
        return "it needs to be told more of a token than a run knows"
    return None


def attention_scale(config: AttentionConfig, num_experts: int) -> float:
    """What the weights of a router that `router_mistakes` has accepted are multiplied by."""
    if config.scale_factor is not None:
        return config.scale_factor
    scale = _balanced_scale(observe(config.router, num_experts))
    assert scale is not None, f"router_mistakes refuses {config.router.name}"
    return scale


def _balanced_scale(gates: Gates) -> float | None:
    if gates.alike is not None:
        return 1.0 / gates.alike
    return gates.top_k / gates.total if gates.total else None


@torch.no_grad()
def counts_all_once(router: Router[Any], scale: float) -> bool:
    """Whether every token uses every expert and each counts 1: it is the dense attention then.

    Args:
        router: As it begins.
        scale: What its weights are multiplied by.
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
