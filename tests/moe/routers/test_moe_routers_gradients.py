"""The contract of every router that discovery finds: gradients of combine weights and losses.

What a router cannot be held to it says in its case, ``tests/moe/routers/router_cases/NAME.py``, with the
reason.

Letters: T tokens, D model width, E experts, K slots a token.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe.routers.base import Router
from moe.routers.configs import RouterConfig
from tests.grid import each
from tests.moe.routers.router_contract import (
    D,
    E,
    every_config,
    is_excused,
    route,
    tokens,
    used_slots,
)
from tests.moe.routers.routing_cases import (
    make_router,
    router_case,
)


@every_config
@each("scale", [0.0, 1.0, 1e5])
def test_gradients_stay_finite(config: RouterConfig, scale: float) -> None:
    router = make_router(config, D, E)
    x_TD = (tokens() * scale).requires_grad_()
    routing = route(router, x_TD)
    total = (routing.weights_TK * tokens(7).repeat(1, E)[:, : routing.weights_TK.shape[1]]).sum()
    total = total + sum(routing.losses.values())
    if not total.requires_grad:
        assert not list(router.parameters()), "parameters that nothing trains"
        return
    total.backward()
    assert x_TD.grad is not None and x_TD.grad.isfinite().all()
    for name, parameter in router.named_parameters():
        assert parameter.grad is not None, f"nothing trains {name}"
        assert parameter.grad.isfinite().all(), f"the gradient of {name} is finite for tokens of any size"


@every_config
@each("training", [True, False])
def test_combine_weights_carry_a_gradient_to_every_parameter(config: RouterConfig, training: bool) -> None:
    router = make_router(config, D, E).train(training)
    routing = route(router, tokens())
    weights_TK = routing.weights_TK.masked_fill(~used_slots(routing), 0)
    parameters = dict(router.named_parameters())
    case = router_case(config.name)
    by_losses = case.trained_by_losses if training else case.trained_by_losses | case.unused_in_evaluation
    if weights_TK.requires_grad:
        (weights_TK * tokens(9).repeat(1, E)[:, : weights_TK.shape[1]]).sum().backward()
    else:
        assert parameters.keys() <= by_losses, "no combine weight has a gradient"
    for name, parameter in parameters.items():
        reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        why = "trained_by_losses of its case names what the combine weights do not reach"
        assert reached is (name not in by_losses), f"{why}: {name}"


@every_config
def test_what_combine_weights_do_not_train_losses_do(config: RouterConfig) -> None:
    by_losses = router_case(config.name).trained_by_losses
    router = make_router(config, D, E)
    x_TD = tokens().requires_grad_()
    losses = route(router, x_TD).losses
    for name in by_losses & dict(router.named_parameters()).keys():
        total = torch.stack(list(losses.values())).sum()
        (grad,) = torch.autograd.grad(total, router.get_parameter(name), retain_graph=True)
        assert grad.abs().sum() > 0, name


@every_config
def test_losses_are_named_scalars_with_a_gradient(config: RouterConfig) -> None:
    router = make_router(config, D, E)
    for name, loss in route(router, tokens()).losses.items():
        assert loss.shape == () and loss.dtype == torch.float32, name
        grads = torch.autograd.grad(loss, list(router.parameters()), allow_unused=True, retain_graph=True)
        assert any(grad is not None and grad.abs().sum() > 0 for grad in grads), name


def _weighed(router: Router[Any], x_TD: Tensor) -> Tensor:
    """A scalar function of the combine weights, and of the losses."""
    routing = route(router, x_TD)
    upstream_TK = tokens(9).double().repeat(1, E)[:, : routing.weights_TK.shape[1]]
    total = (routing.weights_TK.masked_fill(~used_slots(routing), 0) * upstream_TK).sum()
    return torch.stack([total, *(loss.double() for loss in routing.losses.values())]).sum()


@every_config
def test_gradients_agree_with_finite_differences(config: RouterConfig) -> None:
    if is_excused(config, "finite_differences"):
        pytest.skip("excused by its case")
    router, step = make_router(config, D, E).double(), 1e-6
    x_TD = tokens().double()
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
def test_gradients_do_not_reach_what_is_not_trained(config: RouterConfig) -> None:
    router = make_router(config, D, E)
    assert not any(buffer.requires_grad for buffer in router.buffers())
    assert all(name in router.state_dict() for name, _ in router.named_buffers()), "a buffer is not saved"
    assert not any("experts" in name for name in router.state_dict()), "the experts are the layer's own"
