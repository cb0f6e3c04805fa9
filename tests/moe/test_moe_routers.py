"""The contract of every router that discovery finds.

Letters: T tokens, D model width, E experts, K slots a token.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from moe.routers import Router, RouterConfig, router_class, router_classes
from moe.types import Routing
from tests.moe.routing_cases import ROUTER_CONFIGS, label, make_context, make_router

T, D, E = 23, 6, 4
every_config = pytest.mark.parametrize("config", ROUTER_CONFIGS, ids=label)


def _tokens(seed: int = 5, num: int = T) -> Tensor:
    return torch.randn(num, D, generator=torch.Generator().manual_seed(seed))


def _route(router: Router, x_TD: Tensor, **fields: object) -> Routing:
    torch.manual_seed(0)  # for routers that draw noise
    return router(x_TD, make_context(**fields))


def _used(routing: Routing) -> Tensor:
    if routing.slot_mask_TK is None:
        return torch.ones_like(routing.expert_ids_TK, dtype=torch.bool)
    return routing.slot_mask_TK


def _assert_same(a: Routing, b: Routing) -> None:
    for field in ("expert_ids_TK", "weights_TK", "slot_mask_TK", "scores_TE", "logits_TE"):
        one, other = getattr(a, field), getattr(b, field)
        assert (one is None) == (other is None), field
        assert one is None or torch.equal(one, other), field
    assert {n: v.item() for n, v in a.losses.items()} == {n: v.item() for n, v in b.losses.items()}


def _assert_sound(router: Router, routing: Routing, num: int) -> None:
    ids_TK, weights_TK, used_TK = routing.expert_ids_TK, routing.weights_TK, _used(routing)
    assert ids_TK.shape == weights_TK.shape == used_TK.shape and len(ids_TK) == num
    assert ids_TK.dtype == torch.int64 and used_TK.dtype == torch.bool
    assert weights_TK.dtype in (torch.float32, torch.float64)
    assert routing.num_experts == E
    assert ((ids_TK >= 0) & (ids_TK < E))[used_TK].all()
    assert weights_TK[used_TK].isfinite().all()
    for dense_TE in (routing.scores_TE, routing.logits_TE):
        assert dense_TE is None or (dense_TE.shape == (num, E) and dense_TE.isfinite().all())
    if router.weights_sum_to_one and num:
        sums_T = weights_TK.masked_fill(~used_TK, 0).sum(-1)
        # A rounding step for each of the K weights.
        bound = weights_TK.shape[1] * torch.finfo(weights_TK.dtype).eps
        assert (sums_T - 1).abs().max() <= bound


@pytest.mark.parametrize("name", list(router_classes()))
def test_name_class_and_config_belong_together(name: str) -> None:
    cls = router_class(name)
    assert cls is router_classes()[name] and cls.name == name
    assert cls.config_class(name=name).name == name
    assert issubclass(cls.config_class, RouterConfig) and cls.parameter_role == "router"


def test_an_unknown_name_is_refused_with_the_list() -> None:
    with pytest.raises(KeyError, match="no router is called 'nope'; there are: .*topk"):
        router_class("nope")


@every_config
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1.0, 1e5])
def test_weights_are_finite_and_ids_in_range(config: RouterConfig, training: bool, scale: float) -> None:
    router = make_router(config, D, E).train(training)
    routing = _route(router, _tokens() * scale)
    _assert_sound(router, routing, T)
    assert all(loss.isfinite() and loss.shape == () for loss in routing.losses.values())


@every_config
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e5])
def test_gradients_stay_finite(config: RouterConfig, scale: float) -> None:
    router = make_router(config, D, E)
    x_TD = (_tokens() * scale).requires_grad_()
    routing = _route(router, x_TD)
    total = (routing.weights_TK * _tokens(7)[:, : routing.weights_TK.shape[1]]).sum()
    (total + sum(routing.losses.values())).backward()
    assert x_TD.grad is not None and x_TD.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in router.parameters())


@every_config
@pytest.mark.parametrize("num", [0, 1])
def test_few_tokens(config: RouterConfig, num: int) -> None:
    router = make_router(config, D, E)
    routing = _route(router, _tokens(num=num))
    _assert_sound(router, routing, num)
    assert all(loss.isfinite() for loss in routing.losses.values())


@every_config
@pytest.mark.parametrize("training", [True, False])
def test_same_input_same_routing(config: RouterConfig, training: bool) -> None:
    router = make_router(config, D, E).train(training)
    x_TD = _tokens()
    kept_TD, state = x_TD.clone(), copy.deepcopy(router.state_dict())
    _assert_same(_route(router, x_TD), _route(router, x_TD))
    assert torch.equal(x_TD, kept_TD), "the tokens were written to"
    for key, value in router.state_dict().items():
        assert torch.equal(value, state[key]), f"forward changed {key}"


@every_config
def test_evaluation_makes_no_losses_and_no_noise(config: RouterConfig) -> None:
    router = make_router(config, D, E).eval()
    first = router(_tokens(), make_context())
    assert not first.losses
    _assert_same(first, router(_tokens(), make_context(step=7, micro_batch=3)))


@every_config
def test_arithmetic_is_fp32_on_bf16_tokens_and_parameters(config: RouterConfig) -> None:
    narrow = make_router(config, D, E).bfloat16()
    wide = copy.deepcopy(narrow).float()
    x_TD = _tokens().bfloat16()
    found = _route(narrow, x_TD)
    assert found.weights_TK.dtype == torch.float32
    _assert_same(found, _route(wide, x_TD.float()))


@every_config
def test_arithmetic_is_fp32_under_autocast(config: RouterConfig) -> None:
    router = make_router(config, D, E)
    expected = _route(router, _tokens())
    with torch.autocast("cpu", torch.bfloat16):
        _assert_same(_route(router, _tokens()), expected)


@every_config
def test_fp64_models_are_routed_in_fp64(config: RouterConfig) -> None:
    # Or copies, exact by claim, would miss the bound of moe.upcycle.check for fp64 by the rounding of fp32.
    router = make_router(config, D, E).double()
    routing = _route(router, _tokens().double())
    assert routing.weights_TK.dtype == torch.float64
    _assert_sound(router, routing, T)


@every_config
@pytest.mark.parametrize("training", [True, False])
def test_combine_weights_carry_a_gradient_to_every_parameter(config: RouterConfig, training: bool) -> None:
    router = make_router(config, D, E).train(training)
    weights_TK = _route(router, _tokens()).weights_TK
    (weights_TK * _tokens(9)[:, : weights_TK.shape[1]]).sum().backward()
    parameters = dict(router.named_parameters())
    assert parameters
    for name, parameter in parameters.items():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@every_config
def test_losses_are_named_scalars_with_a_gradient(config: RouterConfig) -> None:
    router = make_router(config, D, E)
    for name, loss in _route(router, _tokens()).losses.items():
        assert loss.shape == () and loss.dtype == torch.float32, name
        grads = torch.autograd.grad(loss, list(router.parameters()), allow_unused=True, retain_graph=True)
        assert any(grad is not None and grad.abs().sum() > 0 for grad in grads), name


@every_config
def test_padding_does_not_enter_the_losses(config: RouterConfig) -> None:
    router = make_router(config, D, E)
    mask_T = torch.arange(T) % 4 != 1
    x_TD = _tokens()
    other_TD = torch.where(mask_T[:, None], x_TD, 50 * _tokens(11))
    one = _route(router, x_TD, padding_mask=mask_T.view(1, T)).losses
    other = _route(router, other_TD, padding_mask=mask_T.view(1, T)).losses
    alone = _route(router, x_TD[mask_T]).losses
    for name, loss in one.items():
        torch.testing.assert_close(other[name], loss, rtol=1e-6, atol=0, msg=name)
        torch.testing.assert_close(alone[name], loss, rtol=1e-6, atol=0, msg=name)


@every_config
def test_reset_draws_from_the_generator_alone(config: RouterConfig) -> None:
    router = router_class(config.name)(config, D, E)

    def draw(seed: int) -> dict[str, Tensor]:
        with torch.no_grad():
            for parameter in router.parameters():
                parameter.fill_(float("nan"))
        torch.manual_seed(123)
        before = torch.get_rng_state()
        router.reset_parameters(torch.Generator().manual_seed(seed))
        assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
        return {name: p.detach().clone() for name, p in router.named_parameters()}

    first, second, other = draw(1), draw(1), draw(2)
    assert all(value.isfinite().all() for value in first.values()), "a parameter was left as it was"
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


@every_config
def test_reset_without_a_generator_follows_the_global_seed(config: RouterConfig) -> None:
    router = router_class(config.name)(config, D, E)
    drawn = []
    for _ in range(2):
        torch.manual_seed(4)
        router.reset_parameters()
        drawn.append([p.detach().clone() for p in router.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))


@every_config
def test_check_accepts_what_routes_and_speaks_when_it_refuses(config: RouterConfig) -> None:
    cls = router_class(config.name)
    assert cls.check(config, E) is None
    assert cls.check(config, 64) is None
    message = cls.check(config, 0)
    assert message is None or (". " in message and message.strip() == message), message


@every_config
def test_top_k_is_what_a_token_uses(config: RouterConfig) -> None:
    router = make_router(config, D, E)
    routing = _route(router, _tokens())
    assert 0 < router.top_k <= E
    if routing.slot_mask_TK is None:
        assert routing.expert_ids_TK.shape == (T, router.top_k)
    assert (router.model_width, router.num_experts) == (D, E)
