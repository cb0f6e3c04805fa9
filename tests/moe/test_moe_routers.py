"""The contract of every router that discovery finds.

What a router cannot be held to it says in its case, ``tests/moe/router_cases/NAME.py``, with the reason.

Letters: T tokens, D model width, E experts, K slots a token.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.dispatch.local import LocalDispatcher
from moe.experts import Experts
from moe.layer import MoELayer
from moe.routers import Router, RouterConfig, router_class, router_classes
from moe.types import LayerContext, Routing
from moe.upcycle.weights import ExpertBank
from tests.distributed_helper import run_ranks
from tests.moe.router_case import EXCUSES
from tests.moe.routing_cases import (
    ROUTER_CONFIGS,
    batch_fields,
    label,
    make_bank,
    make_context,
    make_router,
    router_case,
)

T, D, E = 23, 6, 4
every_config = pytest.mark.parametrize("config", ROUTER_CONFIGS, ids=label)


def _tokens(seed: int = 5, num: int = T) -> Tensor:
    return torch.randn(num, D, generator=torch.Generator().manual_seed(seed))


def _context(router: Router[Any], num: int, order_T: Tensor | None = None, **fields: Any) -> LayerContext:
    """The context of a batch of one sequence; with an order, what belongs to the tokens is picked by it."""
    given = batch_fields(num if order_T is None else T, router.num_experts) | fields
    if order_T is not None:
        given["token_ids"] = given["token_ids"][:, order_T]
        given["keys"] = {name: key[:, order_T] for name, key in given["keys"].items()}
    return make_context(**given)


def _route(router: Router[Any], x_TD: Tensor, order_T: Tensor | None = None, **fields: Any) -> Routing:
    torch.manual_seed(0)  # for routers that draw noise
    return router(x_TD, _context(router, len(x_TD), order_T, **fields))


def _dense(routing: Routing) -> Tensor:
    """``[T, E]`` combine weight of each expert; NaN where an expert is not used."""
    used_TK, E = _used(routing), routing.num_experts
    dense_TE = torch.full((len(used_TK), E + 1), float("nan"), dtype=torch.float64)
    ids_TK = routing.expert_ids_TK.masked_fill(~used_TK, E)
    return dense_TE.scatter_(1, ids_TK, routing.weights_TK.detach().double())[:, :E]


def _assert_same_choice(found_TE: Tensor, expected_TE: Tensor) -> None:
    """The same experts; their weights up to the order of sums in a matrix product of another shape."""
    torch.testing.assert_close(found_TE, expected_TE, rtol=1e-4, atol=1e-6, equal_nan=True)


def _state(router: Router[Any]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in router.state_dict().items()}


def _assert_same_state(found: dict[str, Tensor], expected: dict[str, Tensor], why: str) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), f"{why}: {name}"


def _excused(config: RouterConfig, *properties: str) -> bool:
    """Whether the router says that one of these properties is not its own."""
    assert set(properties) <= EXCUSES.keys()
    return bool(router_case(config.name).excused.keys() & set(properties))


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


def _assert_sound(router: Router[Any], routing: Routing, num: int, E: int = E) -> None:
    ids_TK, weights_TK, used_TK = routing.expert_ids_TK, routing.weights_TK, _used(routing)
    assert ids_TK.shape == weights_TK.shape == used_TK.shape and len(ids_TK) == num
    assert ids_TK.dtype == torch.int64 and used_TK.dtype == torch.bool
    assert weights_TK.dtype in (torch.float32, torch.float64)
    assert routing.num_experts == E
    assert ((ids_TK >= 0) & (ids_TK < E))[used_TK].all()
    # Also in unused slots: 0 times infinity is not 0 in backward.
    assert weights_TK.isfinite().all()
    chosen_TE = torch.zeros(num, E + 1).scatter_add_(
        1, ids_TK.masked_fill(~used_TK, E), torch.ones(ids_TK.shape)
    )
    assert (chosen_TE[:, :E] <= 1).all(), "a token meets an expert twice"
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
    total = (routing.weights_TK * _tokens(7).repeat(1, E)[:, : routing.weights_TK.shape[1]]).sum()
    total = total + sum(routing.losses.values())
    if not total.requires_grad:
        assert not list(router.parameters()), "parameters that nothing trains"
        return
    total.backward()
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
    first = router(_tokens(), _context(router, T))
    assert not first.losses
    _assert_same(first, router(_tokens(), _context(router, T, step=7, micro_batch=3)))


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
    routing = _route(router, _tokens())
    weights_TK = routing.weights_TK.masked_fill(~_used(routing), 0)
    parameters = dict(router.named_parameters())
    case = router_case(config.name)
    by_losses = case.trained_by_losses if training else case.trained_by_losses | case.unused_in_evaluation
    if weights_TK.requires_grad:
        (weights_TK * _tokens(9).repeat(1, E)[:, : weights_TK.shape[1]]).sum().backward()
    else:
        assert parameters.keys() <= by_losses, "no combine weight has a gradient"
    for name, parameter in parameters.items():
        reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert reached is (name not in by_losses), name


@every_config
def test_what_combine_weights_do_not_train_losses_do(config: RouterConfig) -> None:
    by_losses = router_case(config.name).trained_by_losses
    router = make_router(config, D, E)
    x_TD = _tokens().requires_grad_()
    losses = _route(router, x_TD).losses
    for name in by_losses & dict(router.named_parameters()).keys():
        total = torch.stack(list(losses.values())).sum()
        (grad,) = torch.autograd.grad(total, router.get_parameter(name), retain_graph=True)
        assert grad.abs().sum() > 0, name


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
    alone = _route(router, x_TD[mask_T], order_T=mask_T).losses
    assert one.keys() == other.keys() == alone.keys()
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
            for buffer in router.buffers():
                buffer.zero_()
        torch.manual_seed(123)
        before = torch.get_rng_state()
        router.reset_parameters(torch.Generator().manual_seed(seed))
        assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
        return _state(router)

    built = _state(router)
    first, second, other = draw(1), draw(1), draw(2)
    assert all(value.isfinite().all() for value in first.values()), "a parameter was left as it was"
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    drawn = {name for name, value in first.items() if not torch.equal(value, other[name])}
    # What is not drawn starts from one value, so that only a router without parameters may draw nothing.
    assert drawn or not list(router.parameters())
    for name in first.keys() - drawn:
        assert torch.equal(first[name], built[name]), f"reset leaves {name} at another value than __init__"


@every_config
def test_reset_without_a_generator_follows_the_global_seed(config: RouterConfig) -> None:
    router = router_class(config.name)(config, D, E)
    drawn = []
    for _ in range(2):
        torch.manual_seed(4)
        router.reset_parameters()
        drawn.append(list(_state(router).values()))
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
    assert 0 < router.top_k <= E and isinstance(router.top_k, int)
    if routing.slot_mask_TK is None:
        assert routing.expert_ids_TK.shape == (T, router.top_k)
    assert (router.model_width, router.num_experts) == (D, E)


@every_config
@pytest.mark.parametrize("training", [True, False])
def test_permuting_tokens_permutes_the_routing(config: RouterConfig, training: bool) -> None:
    if _excused(config, "permutation") or (training and _excused(config, "draws")):
        pytest.skip("excused by its case")
    router = make_router(config, D, E).train(training)
    x_TD = _tokens()
    order_T = torch.randperm(T, generator=torch.Generator().manual_seed(1))
    expected_TE = _dense(_route(router, x_TD))[order_T]
    _assert_same_choice(_dense(_route(router, x_TD[order_T], order_T=order_T)), expected_TE)


def _relabelled(name: str, value: Tensor, order_E: Tensor) -> Tensor:
    """A tensor with the axes that its name calls E in another order."""
    axes = name.rpartition(".")[2].rpartition("_")[2]
    if not axes.isupper():
        return value
    assert len(axes) == value.dim(), f"{name} has {value.dim()} axes"
    for axis, letter in enumerate(axes):
        value = value.index_select(axis, order_E) if letter == "E" else value
    return value


@every_config
@pytest.mark.parametrize("training", [True, False])
def test_relabelling_experts_relabels_the_routing(config: RouterConfig, training: bool) -> None:
    if _excused(config, "relabelling") or (training and _excused(config, "draws")):
        pytest.skip("excused by its case")
    router = make_router(config, D, E).train(training)
    expected_TE = _dense(_route(router, _tokens()))
    order_E = torch.tensor([2, 0, 3, 1])
    router.load_state_dict({n: _relabelled(n, v, order_E) for n, v in _state(router).items()})
    bank = make_bank(D, E)
    moved = ExpertBank(bank.w_up_EUD[order_E], bank.w_down_EDF[order_E], bank.activation, bank.gated)
    router.attach(Experts(moved))
    _assert_same_choice(_dense(_route(router, _tokens())), expected_TE[:, order_E])


@every_config
@pytest.mark.parametrize("training", [True, False])
def test_padding_does_not_change_where_real_tokens_go(config: RouterConfig, training: bool) -> None:
    router = make_router(config, D, E).train(training)
    mask_T = torch.arange(T) % 4 != 1
    x_TD, mask_BS = _tokens(), mask_T.view(1, T)
    other_TD = torch.where(mask_T[:, None], x_TD, 50 * _tokens(11))
    one_TE = _dense(_route(router, x_TD, padding_mask=mask_BS))[mask_T]
    _assert_same_choice(_dense(_route(router, other_TD, padding_mask=mask_BS))[mask_T], one_TE)
    if not (_excused(config, "draws") and training):
        _assert_same_choice(_dense(_route(router, x_TD[mask_T], order_T=mask_T)), one_TE)


@every_config
@pytest.mark.parametrize("num_experts", [1, 2, 3, 5, 7, 16])
@pytest.mark.parametrize("training", [True, False])
def test_any_number_of_experts(config: RouterConfig, num_experts: int, training: bool) -> None:
    if router_class(config.name).check(config, num_experts) is not None:
        pytest.skip("refused in words")
    router = make_router(config, D, num_experts).train(training)
    for x_TD in (_tokens(), _tokens() * 0, _tokens(num=1), _tokens(num=0)):
        routing = _route(router, x_TD)
        _assert_sound(router, routing, len(x_TD), num_experts)
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
        assert router_class(config.name).check(every, num_experts) is None
        router = make_router(every, D, num_experts)
        _assert_sound(router, _route(router, _tokens()), T, num_experts)


def _weighed(router: Router[Any], x_TD: Tensor) -> Tensor:
    """A scalar function of the combine weights, and of the losses."""
    routing = _route(router, x_TD)
    upstream_TK = _tokens(9).double().repeat(1, E)[:, : routing.weights_TK.shape[1]]
    total = (routing.weights_TK.masked_fill(~_used(routing), 0) * upstream_TK).sum()
    return torch.stack([total, *(loss.double() for loss in routing.losses.values())]).sum()


@every_config
def test_gradients_agree_with_finite_differences(config: RouterConfig) -> None:
    if _excused(config, "finite_differences"):
        pytest.skip("excused by its case")
    router, step = make_router(config, D, E).double(), 1e-6
    x_TD = _tokens().double()
    parameters = list(router.parameters())
    if not parameters:
        return
    grads = torch.autograd.grad(_weighed(router, x_TD), parameters)
    g = torch.Generator().manual_seed(4)
    for parameter, grad in zip(parameters, grads, strict=True):
        for _ in range(3):
            direction = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
            values = []
            with torch.no_grad():
                for sign in (1, -2):
                    parameter.add_(direction, alpha=sign * step)
                    values.append(_weighed(router, x_TD))
                parameter.add_(direction, alpha=step)
            numeric = (values[0] - values[1]) / (2 * step)
            # Central differences: error of step^2 and of 1e-16 / step; fp32 losses are only added to it.
            torch.testing.assert_close((grad * direction).sum(), numeric, rtol=1e-5, atol=1e-6)


@every_config
def test_state_round_trip(config: RouterConfig) -> None:
    router = make_router(config, D, E)
    _train_step(router, [_tokens(1), _tokens(2)])
    other = make_router(config, D, E, seed=99)
    other.load_state_dict(router.state_dict(), strict=True)
    for training in (True, False):
        x_TD, step = _tokens(3), {"step": 1}
        _assert_same(
            _route(router.train(training), x_TD, **step), _route(other.train(training), x_TD, **step)
        )


def _train_step(
    router: Router[Any], parts: list[Tensor], micro_batches: list[int] | None = None, **fields: Any
) -> dict[str, Tensor]:
    """Forward passes of the micro-batches in an order, then what the optimizer step changes."""
    order = list(range(len(parts))) if micro_batches is None else micro_batches
    router.train()
    for micro in order:
        counts = {"micro_batch": micro, "num_micro_batches": len(parts)}
        _route(router, parts[micro], **counts, **fields)
    router.after_optimizer_step(make_context(step=1, **fields))
    return _state(router)


@every_config
def test_recomputed_and_evaluated_batches_are_not_counted(config: RouterConfig) -> None:
    parts = [_tokens(1), _tokens(2), 2 * _tokens(3)]
    once, again = make_router(config, D, E), make_router(config, D, E)
    expected = _train_step(once, parts)
    # Backward recomputes the micro-batch that is at its turn; evaluation comes in between at any time.
    _route(again.eval(), _tokens(8), micro_batch=1)
    _route(again.train(), parts[0])
    _route(again.eval(), _tokens(8))
    _assert_same_state(_train_step(again, parts, [0, 0, 1, 1, 2, 2]), expected, "counted twice")
    again.eval()
    before = _state(again)
    _route(again, _tokens(8), step=1)
    _assert_same_state(_state(again), before, "evaluation changed it")


@every_config
def test_a_step_without_tokens_keeps_the_state_finite(config: RouterConfig) -> None:
    router = make_router(config, D, E)
    router.after_optimizer_step(_context(router, 0, step=1))
    _train_step(router, [_tokens(num=0)])
    _train_step(router, [_tokens() * 0])
    for name, value in _train_step(router, [_tokens() * 1e5]).items():
        assert value.isfinite().all(), name
    _assert_sound(router, _route(router.eval(), _tokens()), T)


@every_config
def test_gradients_do_not_reach_what_is_not_trained(config: RouterConfig) -> None:
    router = make_router(config, D, E)
    assert not any(buffer.requires_grad for buffer in router.buffers())
    assert all(name in router.state_dict() for name, _ in router.named_buffers()), "a buffer is not saved"
    assert not any("experts" in name for name in router.state_dict()), "the experts are the layer's own"


def _output(router: Router[Any], x_TD: Tensor, order_T: Tensor | None = None, **fields: Any) -> Tensor:
    """``[T, D]`` of a layer of random experts: what a router does beside routing shows in it as well."""
    context = _context(router, len(x_TD), order_T, **fields)
    layer = MoELayer(router, LocalDispatcher(), Experts(make_bank(D, E)), context)
    torch.manual_seed(0)
    return layer.train(router.training)(x_TD).detach()


def _assert_same_output(found_TD: Tensor, expected_TD: Tensor) -> None:
    # fp32 products of another shape, through an expert whose output is near a hundred.
    torch.testing.assert_close(found_TD, expected_TD, rtol=1e-4, atol=1e-3)


@every_config
def test_causal_routers_see_no_later_token(config: RouterConfig) -> None:
    router = make_router(config, D, E)
    _train_step(router, [_tokens(1), _tokens(2)])
    router.eval()
    x_TD, half = _tokens(), T // 2
    whole_TD = _output(router, x_TD)[:half]
    part_TD = _output(router, x_TD[:half], order_T=torch.arange(half))
    if router.is_causal:
        _assert_same_output(part_TD, whole_TD)
    elif config == type(config)(name=config.name):
        # Or the flag would turn away a router that can generate.
        assert (part_TD - whole_TD).abs().max() > 0.1


@every_config
@pytest.mark.parametrize("training", [True, False])
def test_padding_does_not_change_the_output_of_real_tokens(config: RouterConfig, training: bool) -> None:
    router = make_router(config, D, E).train(training)
    mask_T = torch.arange(T) % 4 != 1
    x_TD, mask_BS = _tokens(), mask_T.view(1, T)
    other_TD = torch.where(mask_T[:, None], x_TD, 50 * _tokens(11))
    one_TD = _output(router, x_TD, padding_mask=mask_BS)[mask_T]
    _assert_same_output(_output(router, other_TD, padding_mask=mask_BS)[mask_T], one_TD)
    if not (_excused(config, "draws") and training):
        _assert_same_output(_output(router, x_TD[mask_T], order_T=mask_T), one_TD)


@every_config
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (3, 1)])
def test_any_batch_shape(config: RouterConfig, shape: tuple[int, int]) -> None:
    router = make_router(config, D, E)
    num = shape[0] * shape[1]
    given = batch_fields(num, E)
    ids_BS = given["token_ids"].view(shape)
    keys = {name: key.view(shape) for name, key in given["keys"].items()}
    for training in (True, False):
        routing = _route(router.train(training), _tokens(num=num), token_ids=ids_BS, keys=keys)
        _assert_sound(router, routing, num)


def _after_two_steps(rank: int, ranks: int) -> dict[str, dict[str, Tensor]]:
    """Four parts of a step: two micro-batches on each of two ranks, or four on one. State of every config."""
    group = torch.distributed.group.WORLD if ranks > 1 else None
    states = {}
    for config in ROUTER_CONFIGS:
        if _excused(config, "ranks"):
            continue
        router = make_router(config, D, E)
        for step in range(2):
            parts = [_tokens(10 * step + part) for part in range(4)]
            _train_step(router, parts[rank::ranks], group=group)
        states[label(config)] = _state(router)
    return states


@pytest.mark.distributed
def test_two_ranks_keep_the_state_of_one() -> None:
    one, two = _after_two_steps(0, 1), run_ranks(_after_two_steps, 2)
    for name, expected in one.items():
        _assert_same_state(two[0][name], two[1][name], f"{name}: the ranks differ")
        for key, value in expected.items():
            # Sums in another order.
            torch.testing.assert_close(two[0][name][key], value, rtol=1e-5, atol=1e-7, msg=f"{name}: {key}")
