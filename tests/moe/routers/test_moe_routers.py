"""The contract of every router that discovery finds: names, sound routings, any size of batch, precision.

What a router cannot be held to it says in its case, ``tests/moe/routers/router_cases/NAME.py``, with the
reason.

Letters: T tokens, D model width, E experts, K slots a token.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from moe.dispatch.local import LocalDispatcher
from moe.routers import router_class, router_classes
from moe.routers.configs import RouterConfig
from tests.grid import each
from tests.moe.routers.router_contract import (
    D,
    E,
    T,
    assert_same,
    assert_sound,
    batch_context,
    every_config,
    route,
    tokens,
)
from tests.moe.routers.routing_cases import (
    batch_fields,
    make_router,
)


@each("name", list(router_classes()))
def test_name_class_and_config_belong_together(name: str) -> None:
    cls = router_class(name)
    assert cls is router_classes()[name] and cls.name == name
    assert cls.config_class(name=name).name == name
    assert issubclass(cls.config_class, RouterConfig) and cls.parameter_role == "router"


def test_an_unknown_name_is_refused_with_the_list() -> None:
    with pytest.raises(KeyError, match="no router is called 'nope'; there are: .*topk"):
        router_class("nope")


@every_config
def test_check_accepts_what_routes_and_speaks_when_it_refuses(config: RouterConfig) -> None:
    assert config.check(E) is None
    assert config.check(64) is None
    found = config.check(0)
    assert found is None or (found.path and found.remedy.endswith(".")), found


@every_config
def test_a_router_that_changes_what_experts_see_says_so(config: RouterConfig) -> None:
    dispatcher = LocalDispatcher()
    changes = make_router(config, D, E).wrap_dispatcher(dispatcher) is not dispatcher
    assert config.mixes_tokens == changes, "mixes_tokens of the config tells whether wrap_dispatcher wraps"


@every_config
def test_top_k_is_what_a_token_uses(config: RouterConfig) -> None:
    router = make_router(config, D, E)
    routing = route(router, tokens())
    assert 0 < router.top_k <= E and isinstance(router.top_k, int), f"top_k is from 1 to E: {router.top_k}"
    if routing.slot_mask_TK is None:
        found = tuple(routing.expert_ids_TK.shape)
        assert found == (T, router.top_k), f"without slot_mask_TK ids are [T, top_k]: {found}"
    assert (router.model_width, router.num_experts) == (D, E)


@every_config
@each("training", [True, False])
def test_a_scheduled_top_k_routes_as_a_router_of_that_top_k(config: RouterConfig, training: bool) -> None:
    router = make_router(config, D, E).train(training)
    if not config.varies_top_k:
        pytest.skip("preflight refuses it")
    for top_k in range(1, E + 1):
        try:
            with_it = dataclasses.replace(config, top_k=top_k)  # type: ignore[call-arg]
        except ValueError:
            continue
        if with_it.check(E) is not None:
            continue
        other = make_router(with_it, D, E).train(training)
        found, expected = route(router, tokens(), top_k={0: top_k}), route(other, tokens())
        assert_same(found, expected, "a router that varies_top_k routes to ctx.top_k(self.top_k) experts")
        # Another layer's number is not this one's.
        found = route(router, tokens(), top_k={1: top_k})
        assert_same(found, route(router, tokens()), "a schedule of another layer has no effect on this one")


@every_config
@each("training", [True, False])
@each("scale", [0.0, 1e-20, 1.0, 1e5])
def test_weights_are_finite_and_ids_in_range(config: RouterConfig, training: bool, scale: float) -> None:
    router = make_router(config, D, E).train(training)
    routing = route(router, tokens() * scale)
    assert_sound(router, routing, T)
    assert all(loss.isfinite() and loss.shape == () for loss in routing.losses.values())


@every_config
@each("num", [0, 1])
def test_few_tokens(config: RouterConfig, num: int) -> None:
    router = make_router(config, D, E)
    routing = route(router, tokens(num=num))
    assert_sound(router, routing, num)
    assert all(loss.isfinite() for loss in routing.losses.values())


@every_config
@each("shape", [(0, 5), (3, 0), (3, 1)])
def test_any_batch_shape(config: RouterConfig, shape: tuple[int, int]) -> None:
    router = make_router(config, D, E)
    num = shape[0] * shape[1]
    given = batch_fields(num, E)
    ids_BS = given["token_ids"].view(shape)
    keys = {name: key.view(shape) for name, key in given["keys"].items()}
    for training in (True, False):
        routing = route(router.train(training), tokens(num=num), token_ids=ids_BS, keys=keys)
        assert_sound(router, routing, num)


@every_config
@each("num_experts", [1, 2, 3, 5, 7, 16])
@each("training", [True, False])
def test_any_number_of_experts(config: RouterConfig, num_experts: int, training: bool) -> None:
    if config.check(num_experts) is not None:
        pytest.skip("refused in words")
    router = make_router(config, D, num_experts).train(training)
    for x_TD in (tokens(), tokens() * 0, tokens(num=1), tokens(num=0)):
        routing = route(router, x_TD)
        assert_sound(router, routing, len(x_TD), num_experts)
        assert all(loss.isfinite() for loss in routing.losses.values())


@every_config
def test_all_experts_at_once(config: RouterConfig) -> None:
    if "top_k" not in vars(config):
        pytest.skip("has no top_k")
    for num_experts in (1, E):
        try:
            every = dataclasses.replace(config, top_k=num_experts)
        except ValueError:
            continue
        assert every.check(num_experts) is None
        router = make_router(every, D, num_experts)
        assert_sound(router, route(router, tokens()), T, num_experts)


@every_config
@each("training", [True, False])
def test_same_input_same_routing(config: RouterConfig, training: bool) -> None:
    router = make_router(config, D, E).train(training)
    x_TD = tokens()
    kept_TD, state = x_TD.clone(), copy.deepcopy(router.state_dict())
    assert_same(route(router, x_TD), route(router, x_TD), "forward has no memory and the global seed alone")
    assert torch.equal(x_TD, kept_TD), "the tokens were written to"
    for key, value in router.state_dict().items():
        assert torch.equal(value, state[key]), f"forward changed {key}"


@every_config
def test_evaluation_makes_no_losses_and_no_noise(config: RouterConfig) -> None:
    router = make_router(config, D, E).eval()
    first = router(tokens(), batch_context(router, T))
    assert not first.losses, f"evaluation makes no losses: {sorted(first.losses)}"
    later = router(tokens(), batch_context(router, T, step=7, micro_batch=3))
    assert_same(first, later, "evaluation draws no noise and does not depend on the step")


@every_config
def test_arithmetic_is_fp32_on_bf16_tokens_and_parameters(config: RouterConfig) -> None:
    narrow = make_router(config, D, E).bfloat16()
    wide = copy.deepcopy(narrow).float()
    x_TD = tokens().bfloat16()
    found = route(narrow, x_TD)
    assert found.weights_TK.dtype == torch.float32, "bf16 tokens are routed in fp32"
    assert_same(found, route(wide, x_TD.float()), "bf16 tokens and parameters are routed in fp32")


@every_config
def test_arithmetic_is_fp32_under_autocast(config: RouterConfig) -> None:
    router = make_router(config, D, E)
    expected = route(router, tokens())
    with torch.autocast("cpu", torch.bfloat16):
        rule = "arithmetic is fp32 under autocast: do it under torch.autocast(..., enabled=False)"
        assert_same(route(router, tokens()), expected, rule)


@every_config
def test_fp64_models_are_routed_in_fp64(config: RouterConfig) -> None:
    # Or copies, exact by claim, would miss the bound of moe.upcycle.equivalence for fp64 by the rounding of
    # fp32.
    router = make_router(config, D, E).double()
    routing = route(router, tokens().double())
    assert routing.weights_TK.dtype == torch.float64, "fp64 tokens are routed in fp64"
    assert_sound(router, routing, T)
