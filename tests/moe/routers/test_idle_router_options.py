"""An option that a router calls idle changes nothing: no choice, weight or loss, nothing between steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from moe.errors import FieldError
from moe.experts.experts import Experts
from moe.routers import router_class, router_classes
from moe.routers.configs import RouterConfig
from moe.types import LayerContext, RouterContext, unless
from tests.grid import each
from tests.moe.routers.routing_cases import make_bank

TOKENS, WIDTH, EXPERTS = 24, 16, 8


def others(config: RouterConfig, name: str) -> Iterator[Any]:
    """Values of an option other than the config's, of its own type."""
    value, hint = getattr(config, name), get_type_hints(type(config))[name]
    if get_origin(hint) is Literal:
        yield from (choice for choice in get_args(hint) if choice != value)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, (int, float)):
        yield from (type(value)(1), value * 2, type(value)(0))
    elif value is None:
        yield from (1, 0.5)


def changed(config: RouterConfig, name: str) -> Iterator[RouterConfig]:
    """The config with another value of an option, wherever the config allows it."""
    for value in others(config, name):
        try:
            yield dataclasses.replace(config, **{name: value})
        except FieldError:
            continue


def variants(config: RouterConfig) -> Iterator[RouterConfig]:
    """The config, and all that differ from it by one option."""
    yield config
    for field in dataclasses.fields(config):
        if field.name != "name":
            yield from changed(config, field.name)


def behaviour(config: RouterConfig) -> list[torch.Tensor]:
    """What two training steps and one evaluation give."""
    router = router_class(config.name)(config, WIDTH, EXPERTS)
    router.reset_parameters(torch.Generator().manual_seed(0))
    router.attach(Experts(make_bank(WIDTH, EXPERTS)))
    x_TD = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1), requires_grad=True)
    found = []
    for step in range(3):
        router.train(step < 2)
        ids_BS = torch.arange(TOKENS).view(2, -1)
        batch = RouterContext(step=step, token_ids=ids_BS, keys={"modality": ids_BS % 2})
        ctx = LayerContext(batch, 0)
        routing = router(x_TD, ctx)
        found += [routing.expert_ids_TK, routing.weights_TK, *routing.losses.values()]
        if routing.weights_TK.requires_grad:
            found += torch.autograd.grad(routing.weights_TK.square().sum(), x_TD, allow_unused=True)
        found += [] if routing.slot_mask_TK is None else [routing.slot_mask_TK]
        router.after_optimizer_step(ctx)
    return [tensor.detach() for tensor in (*found, *router.state_dict().values()) if tensor is not None]


def alike(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Whether two behaviours are the same to the bit."""
    same = [a.shape == b.shape and torch.equal(a, b) for a, b in zip(one, other, strict=False)]
    return len(one) == len(other) and all(same)


@each("name", router_classes())
def test_idle_options_of_a_router_change_nothing(name: str) -> None:
    for config in variants(router_class(name).config_class(name=name)):
        idle = [option for option in config.idle() if "." not in option]
        assert {field.name for field in dataclasses.fields(config)} >= set(idle)
        if not idle:
            continue
        own = behaviour(config)
        for option in idle:
            for other in changed(config, option):
                assert alike(own, behaviour(other)), f"{option} of {config}"


def test_options_are_idle_unless_a_condition_holds() -> None:
    assert unless(True, "reason", "a") == {}
    assert unless(False, "reason", "a", "b") == {"a": "reason", "b": "reason"}
