"""``torch.compile(router, fullgraph=True)`` works, for all steps with one graph, or the router says why not.

Letters: T tokens, D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from moe.routers import router_classes
from moe.routers.base import Router
from moe.routers.configs import RouterConfig
from moe.types import Routing
from tests.moe.routers.routing_cases import ROUTER_CONFIGS, batch_fields, label, make_context, make_router

T, D, E = 32, 6, 4
_UNSUPPORTED_REASONS = (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit)


def _unsupported_reason(name: str) -> str | None:
    return router_classes()[name].compile_unsupported_reason


def _steps(router: Router[Any], forward: Callable[..., Routing], masked: bool) -> list[dict[str, Tensor]]:
    """What three training steps of two micro-batches give: routing, losses, and gradients by name."""
    fields = batch_fields(T, E)
    if masked:
        fields["padding_mask"] = (torch.arange(T) % 4 != 1).view(1, T)
    ctx = make_context(**fields, num_micro_batches=2)
    found = []
    for number in range(6):
        ctx.run.step, ctx.run.micro_batch = divmod(number, 2)
        x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(number)).requires_grad_()
        router.zero_grad()
        routing = forward(x_TD, ctx)
        named = {"weights_TK": routing.weights_TK, **routing.losses}
        carriers = [value for value in named.values() if value.requires_grad]
        if carriers:
            torch.autograd.backward(carriers, [torch.ones_like(value) for value in carriers])
        named |= {f"metric {name}": value for name, value in routing.metrics.items()}
        for name in ("expert_ids_TK", "slot_mask_TK", "scores_TE", "logits_TE"):
            value = getattr(routing, name)
            named |= {} if value is None else {name: value}
        grads = {"x": x_TD.grad} | {name: p.grad for name, p in router.named_parameters()}
        named |= {f"grad {name}": grad for name, grad in grads.items() if grad is not None}
        found.append({name: value.detach().clone() for name, value in named.items()})
        if ctx.run.micro_batch == 1:
            router.after_optimizer_step(ctx)
    return found


def _assert_equal(found: Sequence[dict[str, Tensor]], expected: Sequence[dict[str, Tensor]]) -> None:
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.keys() == other.keys()
        for name, value in other.items():
            # The same operations in the same order; a gradient of several parts may be summed in another.
            torch.testing.assert_close(one[name], value, rtol=1e-6, atol=1e-7, msg=f"pass {number}: {name}")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    # Two graphs for one forward pass are one too many, and refused at once.
    with torch._dynamo.config.patch(recompile_limit=1):
        yield
    torch._dynamo.reset()


def _compiled(router: Router[Any], backend: Any) -> Callable[..., Routing]:
    compiled: Callable[..., Routing] = torch.compile(router, fullgraph=True, backend=backend)
    return compiled


_COMPILE = [config for config in ROUTER_CONFIGS if _unsupported_reason(config.name) is None]


@pytest.mark.parametrize("config", _COMPILE, ids=label)
def test_one_graph_gives_equal_outputs_and_gradients(config: RouterConfig) -> None:
    plain, compiled = make_router(config, D, E), make_router(config, D, E)
    counter = CompileCounterWithBackend("aot_eager")
    found = _steps(compiled, _compiled(compiled, counter), masked=False)
    assert counter.frame_count == 1, f"{counter.frame_count} graphs for three steps"
    _assert_equal(found, _steps(plain, plain, masked=False))


@pytest.mark.parametrize("name", sorted({config.name for config in _COMPILE}))
def test_with_padding(name: str) -> None:
    config = router_classes()[name].config_class(name=name)
    plain, compiled = make_router(config, D, E), make_router(config, D, E)
    found = _steps(compiled, _compiled(compiled, "eager"), masked=True)
    _assert_equal(found, _steps(plain, plain, masked=True))


@pytest.mark.parametrize("name", [name for name in router_classes() if _unsupported_reason(name) is not None])
def test_a_refusal_is_still_true(name: str) -> None:
    router = make_router(router_classes()[name].config_class(name=name), D, E)
    try:
        _steps(router, _compiled(router, "eager"), masked=False)
    except _UNSUPPORTED_REASONS:
        return
    pytest.fail(f"{name} compiles; take this away: {_unsupported_reason(name)}")


def test_avg_k_compiles_behind_a_training_pass() -> None:
    """As its refusal says."""
    config = router_classes()["avg_k"].config_class(name="avg_k")
    router = make_router(config, D, E)
    expected = _steps(router, router, masked=False)
    _assert_equal(_steps(router, _compiled(router, "eager"), masked=False), expected)


@pytest.mark.parametrize("name", ["deepseek_v3", "relu"])
def test_step_sums_compile_with_the_switch_of_their_refusal(name: str) -> None:
    reason = router_classes()[name].compile_unsupported_reason
    assert reason is not None and "allow_unspec_int_on_nn_module" in reason
    config = router_classes()[name].config_class(name=name)
    plain, compiled = make_router(config, D, E), make_router(config, D, E)
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True, recompile_limit=8):
        counter = CompileCounterWithBackend("eager")
        found = _steps(compiled, _compiled(compiled, counter), masked=False)
        before = counter.frame_count
        _steps(compiled, _compiled(compiled, counter), masked=False)
        assert counter.frame_count == before, "more graphs for more steps"
    _assert_equal(found, _steps(plain, plain, masked=False))
