"""Every router and upcycling method with its interesting configs, found by discovery, and layers of them."""

from __future__ import annotations

import torch
from torch import Tensor

from moe.dispatch.local import LocalDispatcher
from moe.experts import Experts
from moe.layer import MoELayer
from moe.routers import Router, RouterConfig, router_class, router_classes
from moe.routers.topk import TopKConfig
from moe.types import LayerContext, RouterContext
from moe.upcycle import FFNWeights, UpcycleConfig, UpcycleMethod, upcycle_methods
from moe.upcycle.copies import CopyConfig

#: Configs next to each class's default. A router without an entry is held to the contract by its default.
_ROUTER_VARIANTS: dict[str, list[RouterConfig]] = {
    "topk": [
        TopKConfig(score=score, order=order, renormalise=renormalise, z_coef=0.1)
        for score in ("softmax", "sigmoid")
        for order in ("score_then_topk", "topk_then_score")
        for renormalise in (True, False)
    ]
    + [TopKConfig(top_k=1, renormalise=False), TopKConfig(top_k=4), TopKConfig(top_k=4, score="sigmoid")],
}
_METHOD_VARIANTS: dict[str, list[UpcycleConfig]] = {
    "copy": [CopyConfig(num_experts=4, noise_std=0.1), CopyConfig(num_experts=2)],
}

ROUTER_CONFIGS = [
    config
    for name, cls in router_classes().items()
    for config in (cls.config_class(name=name), *_ROUTER_VARIANTS.get(name, []))
]
METHOD_CONFIGS = [
    config
    for name, cls in upcycle_methods().items()
    for config in (cls.config_class(name=name), *_METHOD_VARIANTS.get(name, []))
]


def label(config: object) -> str:
    """A short id for pytest: the name and what differs from the default."""
    default = type(config)(name=config.name)  # type: ignore[attr-defined]
    changed = [f"{k}={v}" for k, v in vars(config).items() if v != vars(default)[k]]
    return ",".join([vars(config)["name"], *changed])


def make_router(config: RouterConfig, D: int = 6, E: int = 4, seed: int = 0) -> Router:
    """A router with parameters large enough that its choices are clear."""
    router = router_class(config.name)(config, D, E)
    router.reset_parameters(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.mul_(30)
    return router


def make_method(config: UpcycleConfig) -> UpcycleMethod:
    """The upcycling method of a config."""
    return upcycle_methods()[config.name](config)


def make_context(layer_index: int = 0, **fields: object) -> LayerContext:
    """The view of one layer on a run."""
    return LayerContext(RouterContext(**fields), layer_index)  # type: ignore[arg-type]


def make_ffn(
    gated: bool = True, biased: bool = False, activation: str = "silu", D: int = 6, F: int = 10, seed: int = 3
) -> FFNWeights:
    """Random fp64 weights of a dense network."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64) * 0.5

    return FFNWeights(
        up_FD=normal(F, D),
        down_DF=normal(D, F),
        activation=activation,
        gate_FD=normal(F, D) if gated else None,
        b_gate_F=normal(F) if gated and biased else None,
        b_up_F=normal(F) if biased else None,
        b_down_D=normal(D) if biased else None,
    )


def make_layer(
    router: RouterConfig, method: UpcycleConfig | None = None, ffn: FFNWeights | None = None, **fields: object
) -> MoELayer:
    """An fp64 MoE layer, upcycled by a method (copies by default)."""
    ffn = make_ffn() if ffn is None else ffn
    method = CopyConfig(num_experts=4) if method is None else method
    bank = make_method(method).build(ffn, torch.Generator().manual_seed(1))
    made = make_router(router, ffn.model_width, bank.num_experts)
    return MoELayer(made, LocalDispatcher(), Experts(bank), make_context(**fields)).double()
