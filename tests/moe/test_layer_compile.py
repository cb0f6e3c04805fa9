"""A whole MoE layer is one graph: router, plan, experts, balance loss, with and without unused slots.

Letters: T tokens, D model width, E experts, F expert width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels.plan.row_plan import make_plan
from kernels.torch import expert_ops
from moe.dispatch.local import LocalDispatcher
from moe.experts.experts import Experts
from moe.experts.weights import ExpertBank
from moe.layer import MoELayer
from moe.routers.configs import RouterConfig
from tests.kernels.expert_reference import FACTORS, NAMES, Sizes, make_inputs
from tests.moe.routers.routing_cases import ROUTER_CONFIGS, batch_fields, make_context, make_router

T, D, E, F = 32, 8, 4, 12


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _config(name: str) -> RouterConfig:
    return next(config for config in ROUTER_CONFIGS if config.name == name)


def _run(layer: MoELayer, compiled: bool) -> list[Tensor]:
    forward = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
    out_TD = forward(x_TD)
    grads = torch.autograd.grad(out_TD.square().sum(), [x_TD, *layer.parameters()], allow_unused=True)
    return [out_TD, *(grad for grad in grads if grad is not None)]


# topk uses every slot, dselect_k leaves some unused; each layer is compiled before it has ever run.
@pytest.mark.parametrize("router", ["topk", "dselect_k"])
def test_a_layer_compiles_without_a_break(router: str) -> None:
    g = torch.Generator().manual_seed(0)
    bank = ExpertBank(torch.randn(E, 2 * F, D, generator=g), torch.randn(E, D, F, generator=g), "silu", True)
    made, context = make_router(_config(router), D, E), make_context(**batch_fields(T, E))
    plain = MoELayer(made, LocalDispatcher(), Experts(bank, "cpu"), context)
    other = copy.deepcopy(plain)
    other.experts.backends.backend = "auto"  # which must not ask a graph how many rows there are
    expected, found = _run(plain, compiled=False), _run(other, compiled=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(*(next(iter(layer.stats.sums.values())) for layer in (plain, other)))
    chosen = other.experts.backend_choice()
    assert chosen is not None and chosen.backend.name == "cpu"


@pytest.mark.parametrize(("rank", "biased", "masked"), [(0, False, False), (3, True, True)])
def test_the_operators_of_the_cpu_pass_opcheck(rank: int, biased: bool, masked: bool) -> None:
    inputs = make_inputs(Sizes(T=5, E=3, b_up=biased, b_down=biased, rank=rank)).to(torch.float32)
    mask_TK = torch.arange(10).view(5, 2) % 3 > 0 if masked else None
    plan = make_plan(inputs.ids_TK, 3, mask_TK)
    index, flags = [plan.token_R, plan.slot_R, plan.row_TK, plan.counts_E], [plan.has_unused, plan.is_padded]
    rest = ([], index, flags, inputs.sizes.activation, inputs.sizes.gated, 0.5, "cpu")
    leaves = {n: v.detach().clone().requires_grad_() for n, v in inputs.tensors.items()}
    tensors = [leaves.get(name) for name in NAMES]
    factors = [leaves[name] for name in FACTORS if rank]
    torch.library.opcheck(expert_ops.experts_op, (*tensors, factors, *rest, True))
    held = [None if value is None else value.detach() for value in tensors]
    factors = [value.detach() for value in factors]
    kept = list(expert_ops.experts_op(*held, factors, *rest, True)[1:])
    for every in (True, False):
        known = [*held, *(factors or [None] * 4)]
        need = [value is not None and (every or i in (0, 3)) for i, value in enumerate(known)]
        arguments = (inputs.grad_TD, *held, factors, rest[0], kept, *rest[1:], need)
        torch.library.opcheck(expert_ops.experts_backward_op, arguments)
    out_TD, *nothing = expert_ops.experts_op(*held, factors, *rest, False)
    assert not any(value.numel() for value in nothing) and len(out_TD) == 5
