"""No router makes the host wait for a GPU, or loops over tokens or experts, unless it says so: seen on a CPU.

Every operation of a training pass is watched for those that on a GPU hand a value to the host, or the host's
value to the GPU by a blocking copy. A router that needs some says why in ``Router.host_syncs``.

Letters: T tokens, D model width, E experts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from moe.routers import router_classes
from moe.routers.configs import RouterConfig
from moe.types import Routing
from tests.grid import each
from tests.moe.routers.routing_cases import (
    ROUTER_CONFIGS,
    batch_fields,
    label,
    make_context,
    make_router,
)

_ATEN = torch.ops.aten
# What hands the host a value, or a shape that depends on values; and what copies a value of the host's
# (torch.tensor, x[0] = 1.0), for which PyTorch waits as well: pytorch issues 120996 and 186482.
_WAITING = {
    _ATEN._local_scalar_dense: "reads a value",
    _ATEN.equal: "reads a value",
    _ATEN.nonzero: "has as many elements as are not zero",
    _ATEN.masked_select: "has as many elements as are selected",
    _ATEN._unique2: "has as many elements as are unique",
    _ATEN.unique_dim: "has as many elements as are unique",
    _ATEN.unique_consecutive: "has as many elements as are unique",
    _ATEN.bincount: "has as many elements as the largest value",
    _ATEN.lift_fresh: "copies a value of the host's",
}
_BY_MASK = (_ATEN.index, _ATEN.index_put, _ATEN.index_put_)
# Operations that do not get there on a CPU.
_TO_HOST = (Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.__array__)
# What these report as the number of their iterations, whose operations are counted each.
_ITERATIONS = ("auction_rounds", "sinkhorn_iterations")


def _culprit() -> str:
    """The function of `moe` that is running, or what is when the operation is autograd's own."""
    frame = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("moe."):
            return f"{module}.{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "backward"


class _Watch(TorchDispatchMode):
    """Counts operations and writes down those for which the host would wait: culprit and reason."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.waits: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        packet = func.overloadpacket
        if packet in _WAITING:
            self.waits.append((_culprit(), _WAITING[packet]))
        elif packet in _BY_MASK:
            if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]):
                self.waits.append((_culprit(), "picks by a mask"))
        elif packet is _ATEN.repeat_interleave and "output_size" not in (kwargs or {}):
            self.waits.append((_culprit(), "has as many elements as the repeats sum to"))
        return func(*args, **(kwargs or {}))


class _WatchPython(TorchFunctionMode):
    """The same for what is no operation on a CPU."""

    def __init__(self, heartbeat: _Watch) -> None:
        super().__init__()
        self.heartbeat = heartbeat

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _TO_HOST:
            self.heartbeat.waits.append((_culprit(), f"brings a tensor to the host by {func.__name__}"))
        return func(*args, **(kwargs or {}))


def _watched(run: Callable[[], object]) -> _Watch:
    heartbeat = _Watch()
    with _WatchPython(heartbeat), heartbeat:
        run()
    return heartbeat


def _pass(config: RouterConfig, T: int, E: int, masked: bool) -> tuple[_Watch, Routing]:
    """A router's first training pass, forward and backward."""
    router = make_router(config, 6, E)
    fields = batch_fields(T, E)
    if masked:
        fields["padding_mask"] = (torch.arange(T) % 4 != 1).view(1, T)
    ctx = make_context(**fields)
    x_TD = torch.randn(T, 6, generator=torch.Generator().manual_seed(5)).requires_grad_()
    found: list[Routing] = []

    def run() -> None:
        routing = router(x_TD, ctx)
        found.append(routing)
        carriers = [v for v in (routing.weights_TK, *routing.losses.values()) if v.requires_grad]
        if carriers:
            torch.autograd.backward(carriers, [torch.ones_like(v) for v in carriers])

    return _watched(run), found[0]


def _configs(name: str) -> list[RouterConfig]:
    return [config for config in ROUTER_CONFIGS if config.name == name]


def _blamed(config: RouterConfig) -> list[tuple[str, str]]:
    """Culprits and reasons of a router's own waits, with and without padding."""
    return [
        (culprit, reason)
        for masked in (False, True)
        for culprit, reason in _pass(config, 32, 4, masked)[0].waits
    ]


_WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool((x > 0).all()),
    "or": lambda x: x.sum() or 1,
    "index by a tensor": lambda x: x[x.argmax()],
    "mask": lambda x: x[x > 0],
    "write by mask": lambda x: x.__setitem__(x > 0, x.sum()),
    "masked_select": lambda x: x.masked_select(x > 0),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x.long().bincount(),
    "repeats": lambda x: x.repeat_interleave(x.long()),
    "equal": lambda x: torch.equal(x, x + 1),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "tensor": lambda x: torch.tensor(1.0),
    "new_tensor": lambda x: x.new_tensor(1.0),
    "write a number": lambda x: x.__setitem__(0, 1.0),
}
_DOES_NOT_WAIT: dict[str, Callable[[Tensor], object]] = {
    "fill_": lambda x: x[0].fill_(1.0),
    "full": lambda x: torch.full((), 1.0, device=x.device),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "topk": lambda x: x.topk(2),
    "gather": lambda x: x[x.argsort()[:2]],
    "masked_fill": lambda x: x.masked_fill(x > 0, 0),
    "repeats known": lambda x: x.repeat_interleave(2),
    "scatter": lambda x: torch.zeros(9).scatter_add_(0, x.long(), x),
    "slice": lambda x: x[1:].copy_(x[:-1].clone()),
}


@each("name", _WAITS)
def test_what_waits_is_seen(name: str) -> None:
    x = torch.arange(4.0)
    assert _watched(lambda: _WAITS[name](x)).waits, name


@each("name", _DOES_NOT_WAIT)
def test_what_does_not_wait_is_let_through(name: str) -> None:
    x = torch.arange(4.0)
    assert not _watched(lambda: _DOES_NOT_WAIT[name](x)).waits, name


@each("name", list(router_classes()))
def test_the_host_waits_only_where_a_router_says_why(name: str) -> None:
    blamed = [
        f"{label(config)}: {culprit} {reason}"
        for config in _configs(name)
        for culprit, reason in _blamed(config)
    ]
    reason = router_classes()[name].host_syncs
    if reason is None:
        assert not blamed, "\n".join(blamed)
    elif name != "permuted":  # its configs do not search: see the next test
        assert blamed, f"{name} does not wait any more; take this away: {reason}"


def test_a_permutation_search_waits_as_it_says() -> None:
    from moe.routers.configs.permuted_config import PermutedConfig
    from moe.routing.permutation_config import PermutationConfig

    culprits = {culprit for culprit, _ in _blamed(PermutedConfig(search=PermutationConfig(steps=5)))}
    assert culprits == {"moe.routing.permutation.is_searching", "moe.routing.slots.slots_of_gates"}


def test_routers_that_know_how_many_experts_a_token_uses_do_not_ask() -> None:
    from moe.routers.configs.quantile_config import QuantileConfig

    assert not _blamed(QuantileConfig())
    assert _blamed(QuantileConfig(mode="dynamic"))


def _operations(config: RouterConfig, T: int, E: int) -> float:
    """Operations of a pass; of an iteration, where there are iterations until something has converged."""
    heartbeat, routing = _pass(config, T, E, masked=False)
    iterations = sum(float(routing.metrics[name]) for name in _ITERATIONS if name in routing.metrics)
    return heartbeat.operations / (1 + iterations)


@each("config", ROUTER_CONFIGS, ids=label)
def test_operations_do_not_grow_with_tokens_or_experts(config: RouterConfig) -> None:
    # Eight times as many: a Python loop would have eight times the operations. Trees and binary codes have a
    # level for each doubling: 5 in place of 2.
    few, more_T, more_E = (_operations(config, T, E) for T, E in ((32, 4), (256, 4), (32, 32)))
    assert more_T <= 2 * few, f"a loop over tokens? {few} operations, and {more_T} for 8 times the tokens"
    assert more_E <= 2.5 * few, f"a loop over experts? {few} operations, and {more_E} for 8 times the experts"
