"""Every router and upcycling method with its interesting configs, found by discovery, and layers of them.

A router's configs beyond its default stand in ``tests/moe/router_cases/NAME.py``, as ``CASE``.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from moe.dispatch.local import LocalDispatcher
from moe.experts import Experts
from moe.layer import MoELayer
from moe.routers import Router, RouterConfig, router_class, router_classes
from moe.types import LayerContext, RouterContext
from moe.upcycle import FFNWeights, UpcycleConfig, UpcycleMethod, upcycle_methods
from moe.upcycle.copies import CopyConfig
from moe.upcycle.weights import ExpertBank
from tests.moe.router_case import RouterCase

_METHOD_VARIANTS: dict[str, list[UpcycleConfig]] = {
    "copy": [CopyConfig(num_experts=4, noise_std=0.1), CopyConfig(num_experts=2)],
}


def router_case(name: str) -> RouterCase:
    """What ``tests/moe/router_cases/NAME.py`` says of a router; nothing where there is no such file."""
    module = f"tests.moe.router_cases.{name}"
    if importlib.util.find_spec(module) is None:
        return RouterCase()
    case: RouterCase = importlib.import_module(module).CASE
    assert all(config.name == name for config in case.variants), name
    return case


ROUTER_CONFIGS = [
    config
    for name, cls in router_classes().items()
    for config in (cls.config_class(name=name), *router_case(name).variants)
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


def make_bank(D: int = 6, E: int = 4, F: int = 10, seed: int = 2) -> ExpertBank:
    """Random fp32 experts, all different, for routers that read their weights."""
    g = torch.Generator().manual_seed(seed)
    return ExpertBank(torch.randn(E, 2 * F, D, generator=g), torch.randn(E, D, F, generator=g), "silu", True)


def make_router(
    config: RouterConfig, D: int = 6, E: int = 4, seed: int = 0, bank: ExpertBank | None = None
) -> Router[Any]:
    """A router with parameters large enough that its choices are clear, attached to different experts."""
    router = router_class(config.name)(config, D, E)
    router.reset_parameters(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.mul_(30)
    router.attach(Experts(make_bank(D, E) if bank is None else bank))
    return router


def make_method(config: UpcycleConfig) -> UpcycleMethod[Any]:
    """The upcycling method of a config."""
    return upcycle_methods()[config.name](config)


def make_context(layer_index: int = 0, **fields: object) -> LayerContext:
    """The view of one layer on a run."""
    return LayerContext(RouterContext(**fields), layer_index)  # type: ignore[arg-type]


def batch_fields(num_tokens: int, num_experts: int) -> dict[str, Any]:
    """All that a caller may tell of a batch of one sequence: token ids, and a key in [0, E) of each token."""
    ids_T = (torch.arange(num_tokens) * 37 + 11) % 101
    keys = {"modality": (ids_T % num_experts).view(1, -1)}
    return {"token_ids": ids_T.view(1, -1), "keys": keys}


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


def _tell_batch(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
    """What a host does before every forward pass; the ids follow from the shape of x."""
    assert isinstance(layer, MoELayer)
    shape = args[0].shape[:-1] if args[0].dim() == 3 else (1, args[0].shape[:-1].numel())
    run = layer.context.run
    if run.token_ids is None or run.token_ids.shape != shape:
        fields = batch_fields(torch.Size(shape).numel(), layer.router.num_experts)
        run.token_ids = fields["token_ids"].view(shape)
        run.keys = {name: key.view(shape) for name, key in fields["keys"].items()}


def make_layer(
    router: RouterConfig, method: UpcycleConfig | None = None, ffn: FFNWeights | None = None, **fields: object
) -> MoELayer:
    """An fp64 MoE layer, upcycled by a method (by default the router's own, or copies)."""
    ffn = make_ffn() if ffn is None else ffn
    if method is None:
        method = router_case(router.name).method or CopyConfig(num_experts=4)
    bank = make_method(method).build(ffn, torch.Generator().manual_seed(1))
    made = make_router(router, ffn.model_width, bank.num_experts)
    layer = MoELayer(made, LocalDispatcher(), Experts(bank), make_context(**fields)).double()
    layer.register_forward_pre_hook(_tell_batch)
    return layer
