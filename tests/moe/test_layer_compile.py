"""A whole MoE layer is one graph: router, plan, experts, balance loss, with and without unused slots.

Letters: T tokens, D model width, E experts, F expert width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.backend import ExpertTensors, LowRank
from kernels.cpu import cpu_ops
from kernels.cpu.expert_autograd import Weights
from kernels.plan.row_plan import make_plan
from moe.dispatch.local import LocalDispatcher
from moe.experts.experts import Experts
from moe.experts.weights import ExpertBank
from moe.layer import MoELayer
from moe.routers import RouterConfig
from tests.kernels.expert_reference import NAMES, Inputs, Sizes, make_inputs
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


def _experts(inputs: Inputs, rank: int) -> tuple[list[Tensor | None], ExpertTensors]:
    leaves = {n: v.detach().clone().requires_grad_() for n, v in inputs.tensors.items()}
    x, weights, w_up, w_down, b_up, b_down = (leaves.get(n) for n in NAMES)
    experts = ExpertTensors(w_up, w_down, inputs.sizes.activation, inputs.sizes.gated, b_up, b_down)
    if rank:
        sizes = inputs.sizes
        shapes = (rank, sizes.D), (w_up.shape[1], rank), (rank, sizes.F), (sizes.D, rank)
        factors = [torch.randn(sizes.E, *shape).requires_grad_() for shape in shapes]
        experts = replace(experts, low_rank=LowRank(*factors, scale=0.5))
    return [x, weights, *Weights.of(experts)], experts


@pytest.mark.parametrize(("rank", "biased", "masked"), [(0, False, False), (3, True, True)])
def test_the_operators_of_the_cpu_pass_opcheck(rank: int, biased: bool, masked: bool) -> None:
    inputs = make_inputs(Sizes(T=5, E=3, b_up=biased, b_down=biased)).to(torch.float32)
    mask_TK = torch.arange(10).view(5, 2) % 3 > 0 if masked else None
    plan = make_plan(inputs.ids_TK, 3, mask_TK)
    tensors, experts = _experts(inputs, rank)
    index, unused = [plan.token_R, plan.slot_R, plan.row_TK, plan.counts_E], [plan.has_unused, plan.is_padded]
    rest = (experts.activation, experts.gated, 0.5)
    torch.library.opcheck(cpu_ops.cpu_experts, (*tensors, index, unused, *rest, True))
    held = [None if value is None else value.detach() for value in tensors]
    kept = list(cpu_ops.cpu_experts(*held, index, unused, *rest, True)[1:])
    for every in (True, False):
        need = [value is not None and (every or i in (0, 3)) for i, value in enumerate(held)]
        arguments = (inputs.grad_TD, *held, kept, index, unused, *rest, need)
        torch.library.opcheck(cpu_ops.cpu_experts_backward, arguments)
    out_TD, *nothing = cpu_ops.cpu_experts(*held, index, unused, *rest, False)
    assert not any(value.numel() for value in nothing) and len(out_TD) == 5
