"""Every router and upcycling method with its interesting configs, found by discovery, and layers of them.

A router's configs beyond its default stand in ``tests/moe/routers/router_cases/NAME.py``, a method's in
``tests/moe/upcycle/method_cases/NAME.py``, as ``CASE``.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moe.dispatch.local import LocalDispatcher
from moe.experts.experts import Experts
from moe.experts.shared import SharedExpert
from moe.experts.weights import ExpertBank, FFNWeights
from moe.layer import MoELayer
from moe.routers import router_class, router_classes
from moe.routers.base import Router
from moe.routers.configs import RouterConfig
from moe.routers.configs.topk_config import TopKConfig
from moe.types import LayerContext, RouterContext
from moe.upcycle import upcycle_methods
from moe.upcycle.base import UpcycleMethod
from moe.upcycle.build_experts import BuiltLayer, ffn_shape
from moe.upcycle.configs import UpcycleConfig
from moe.upcycle.configs.copies_config import CopyConfig
from moe.upcycle.layer_plan import Draws
from moe.upcycle.router_start import start_rows
from tests.moe.dispatch.gathered import gathered
from tests.moe.routers.router_case import RouterCase
from tests.moe.upcycle.method_case import MethodCase


def router_case(name: str) -> RouterCase:
    """Returns the case of a router, ``router_cases/NAME.py``; an empty one where there is no such file."""
    module = f"tests.moe.routers.router_cases.{name}"
    if importlib.util.find_spec(module) is None:
        return RouterCase()
    case: RouterCase = importlib.import_module(module).CASE
    assert all(config.name == name for config in case.variants), name
    return case


def method_case(name: str) -> MethodCase:
    """Returns the case of a method, ``method_cases/NAME.py``; an empty one where there is no such file."""
    module = f"tests.moe.upcycle.method_cases.{name}"
    if importlib.util.find_spec(module) is None:
        return MethodCase()
    case: MethodCase = importlib.import_module(module).CASE
    assert all(config.name == name for config in case.variants), name
    return case


_METHODS = upcycle_methods()
ROUTER_CONFIGS = [
    config
    for name, cls in router_classes().items()
    for config in (cls.config_class(name=name), *router_case(name).variants)
]
METHOD_CONFIGS = [
    config
    for name, cls in _METHODS.items()
    for config in (cls.config_class(name=name), *method_case(name).variants)
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


def make_method(config: UpcycleConfig, router: RouterConfig | None = None) -> UpcycleMethod[Any]:
    """The upcycling method of a config, for a router: by default top-2 with weights that sum to 1."""
    method: UpcycleMethod[Any] = _METHODS[config.name](config)
    return method.for_router(router or TopKConfig())


def build(
    config: UpcycleConfig, ffn: FFNWeights, router: RouterConfig | None = None, seed: int = 1
) -> BuiltLayer:
    """What a method makes of a network; its further sources are other random networks of the same shape."""
    method = make_method(config, router)
    others = [_alike(ffn, 100 + number) for number in range(method.num_sources - 1)]
    given = method_case(config.name).statistics(ffn)
    measured = gathered(method, ffn)
    found = {name: given.get(name, measured[name]) for name in method.statistics}
    return method.build([ffn, *others], Draws(seed, layer=0), found)


def _alike(ffn: FFNWeights, seed: int) -> FFNWeights:
    shape = ffn_shape(ffn)
    other = make_ffn(shape.gated, shape.up_bias, shape.activation, shape.model_width, shape.width, seed)
    named = {
        name: value.to(ffn.up_FD.dtype) for name, value in vars(other).items() if isinstance(value, Tensor)
    }
    return replace(other, **named)


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
    built = build(method, ffn, router)
    made = make_router(router, ffn.model_width, built.bank.num_experts)
    start_rows(made, built.router)
    shared = None if built.shared is None else SharedExpert(built.shared)
    layer = MoELayer(made, LocalDispatcher(), Experts(built.bank), make_context(**fields), shared).double()
    layer.register_forward_pre_hook(_tell_batch)
    return layer
