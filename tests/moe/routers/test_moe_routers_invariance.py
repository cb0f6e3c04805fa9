"""The contract of every router that discovery finds: order, labels, padding and later tokens.

What a router cannot be held to it says in its case, ``tests/moe/routers/router_cases/NAME.py``, with the
reason.

Letters: T tokens, D model width, E experts, K slots a token.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe.dispatch.local import LocalDispatcher
from moe.experts.experts import Experts
from moe.experts.weights import ExpertBank
from moe.layer import MoELayer
from moe.routers import router_class
from moe.routers.base import Router
from moe.routers.configs import RouterConfig
from tests.grid import each
from tests.moe.routers.router_contract import (
    D,
    E,
    T,
    assert_same_choice,
    batch_context,
    dense_weights,
    every_config,
    is_excused,
    route,
    state_of,
    tokens,
    train_step,
)
from tests.moe.routers.routing_cases import (
    make_bank,
    make_router,
)


@every_config
@each("training", [True, False])
def test_permuting_tokens_permutes_the_routing(config: RouterConfig, training: bool) -> None:
    if is_excused(config, "permutation") or (training and is_excused(config, "draws")):
        pytest.skip("excused by its case")
    router = make_router(config, D, E).train(training)
    x_TD = tokens()
    order_T = torch.randperm(T, generator=torch.Generator().manual_seed(1))
    expected_TE = dense_weights(route(router, x_TD))[order_T]
    found_TE = dense_weights(route(router, x_TD[order_T], order_T=order_T))
    assert_same_choice(found_TE, expected_TE, "the order of the tokens does not matter")


@every_config
def test_names_tell_the_axes_of_experts(config: RouterConfig) -> None:
    """Or relabelling the experts would leave a tensor out, which shows only once its values differ."""
    experts = 7  # the size of no other axis
    if is_excused(config, "relabelling") or config.check(experts) is not None:
        pytest.skip("excused by its case, or refused in words")
    for name, value in state_of(router_class(config.name)(config, 11, experts)).items():
        places = [place for place, size in enumerate(value.shape) if size == experts]
        axes = name.rpartition("_")[2]
        named = len(axes) == value.dim() and all(axes[place] in "EN" for place in places)
        rule = "the end of a tensor's name tells its axes, E for experts"
        assert named or not places, f"{rule}: {name} {tuple(value.shape)}"


def _relabelled(name: str, value: Tensor, order_E: Tensor) -> Tensor:
    """A tensor with the axes that its name calls E, or N where these are the experts, in another order."""
    axes = name.rpartition(".")[2].rpartition("_")[2]
    if not axes.isupper():
        return value
    assert len(axes) == value.dim(), f"{name} has {value.dim()} axes"
    for axis, letter in enumerate(axes):
        experts = letter == "E" or (letter == "N" and value.shape[axis] == len(order_E))
        value = value.index_select(axis, order_E) if experts else value
    return value


@every_config
@each("training", [True, False])
def test_relabelling_experts_relabels_the_routing(config: RouterConfig, training: bool) -> None:
    if is_excused(config, "relabelling") or (training and is_excused(config, "draws")):
        pytest.skip("excused by its case")
    router = make_router(config, D, E).train(training)
    expected_TE = dense_weights(route(router, tokens()))
    order_E = torch.tensor([2, 0, 3, 1])
    router.load_state_dict({n: _relabelled(n, v, order_E) for n, v in state_of(router).items()})
    bank = make_bank(D, E)
    moved = ExpertBank(bank.w_up_EUD[order_E], bank.w_down_EDF[order_E], bank.activation, bank.gated)
    router.attach(Experts(moved))
    rule = "experts in another order are chosen in that order"
    assert_same_choice(dense_weights(route(router, tokens())), expected_TE[:, order_E], rule)


@every_config
@each("training", [True, False])
def test_padding_does_not_change_where_real_tokens_go(config: RouterConfig, training: bool) -> None:
    router = make_router(config, D, E).train(training)
    mask_T = torch.arange(T) % 4 != 1
    x_TD, mask_BS = tokens(), mask_T.view(1, T)
    other_TD = torch.where(mask_T[:, None], x_TD, 50 * tokens(11))
    one_TE = dense_weights(route(router, x_TD, padding_mask=mask_BS))[mask_T]
    found_TE = dense_weights(route(router, other_TD, padding_mask=mask_BS))[mask_T]
    assert_same_choice(found_TE, one_TE, "real tokens do not depend on what padding holds")
    if not (is_excused(config, "draws") and training):
        alone_TE = dense_weights(route(router, x_TD[mask_T], order_T=mask_T))
        assert_same_choice(alone_TE, one_TE, "padding takes no place from real tokens")


@every_config
def test_padding_does_not_enter_the_losses(config: RouterConfig) -> None:
    router = make_router(config, D, E)
    mask_T = torch.arange(T) % 4 != 1
    x_TD = tokens()
    other_TD = torch.where(mask_T[:, None], x_TD, 50 * tokens(11))
    one = route(router, x_TD, padding_mask=mask_T.view(1, T)).losses
    other = route(router, other_TD, padding_mask=mask_T.view(1, T)).losses
    alone = route(router, x_TD[mask_T], order_T=mask_T).losses
    assert one.keys() == other.keys() == alone.keys()
    for name, loss in one.items():
        rule = f"losses count real tokens alone: {name}"
        torch.testing.assert_close(other[name], loss, rtol=1e-6, atol=0, msg=rule)
        torch.testing.assert_close(alone[name], loss, rtol=1e-6, atol=0, msg=rule)


def _output(router: Router[Any], x_TD: Tensor, order_T: Tensor | None = None, **fields: Any) -> Tensor:
    """``[T, D]`` of a layer of random experts: what a router does beside routing shows in it as well."""
    context = batch_context(router, len(x_TD), order_T, **fields)
    layer = MoELayer(router, LocalDispatcher(), Experts(make_bank(D, E)), context)
    torch.manual_seed(0)
    return layer.train(router.training)(x_TD).detach()


def _assert_same_output(found_TD: Tensor, expected_TD: Tensor) -> None:
    # fp32 products of another shape, through an expert whose output is near a hundred.
    torch.testing.assert_close(found_TD, expected_TD, rtol=1e-4, atol=1e-3)


@every_config
@each("training", [True, False])
def test_padding_does_not_change_the_output_of_real_tokens(config: RouterConfig, training: bool) -> None:
    router = make_router(config, D, E).train(training)
    mask_T = torch.arange(T) % 4 != 1
    x_TD, mask_BS = tokens(), mask_T.view(1, T)
    other_TD = torch.where(mask_T[:, None], x_TD, 50 * tokens(11))
    one_TD = _output(router, x_TD, padding_mask=mask_BS)[mask_T]
    _assert_same_output(_output(router, other_TD, padding_mask=mask_BS)[mask_T], one_TD)
    if not (is_excused(config, "draws") and training):
        _assert_same_output(_output(router, x_TD[mask_T], order_T=mask_T), one_TD)


@every_config
def test_causal_routers_see_no_later_token(config: RouterConfig) -> None:
    router = make_router(config, D, E)
    train_step(router, [tokens(1), tokens(2)])
    router.eval()
    x_TD, half = tokens(), T // 2
    whole_TD = _output(router, x_TD)[:half]
    part_TD = _output(router, x_TD[:half], order_T=torch.arange(half))
    if router.is_causal:
        _assert_same_output(part_TD, whole_TD)
    elif config == type(config)(name=config.name):
        # Or the flag would turn away a router that can generate.
        assert (part_TD - whole_TD).abs().max() > 0.1
