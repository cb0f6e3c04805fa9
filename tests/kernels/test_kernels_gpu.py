"""What only a GPU can show of the Triton back end: no waiting for the host, and replay of a captured graph.

The contract of all back ends runs on the GPU besides, wherever there is one.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.backend import ExpertTensors
from kernels.expert_mlp import BACKENDS
from kernels.plan import make_plan
from tests.kernels.expert_reference import Sizes, make_inputs, workload

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
SIZES = Sizes(T=300, K=4, E=8, D=128, F=96)


def _leaves() -> tuple[list[Tensor], Tensor, Tensor]:
    refusal = BACKENDS["triton"].refusal(workload(SIZES, torch.bfloat16, "cuda"))
    if refusal is not None:
        pytest.skip(refusal)
    inputs = make_inputs(SIZES).to(torch.bfloat16, "cuda")
    return [v.requires_grad_() for v in inputs.tensors.values()], inputs.ids_TK, inputs.grad_TD


def _step(leaves: list[Tensor], ids_TK: Tensor, grad_TD: Tensor) -> list[Tensor]:
    x_TD, weights_TK, w_up_EUD, w_down_EDF = leaves
    experts = ExpertTensors(w_up_EUD, w_down_EDF, "silu", True)
    out_TD = BACKENDS["triton"].run(x_TD, weights_TK, make_plan(ids_TK, SIZES.E), experts)
    return [out_TD, *torch.autograd.grad(out_TD, leaves, grad_TD)]


def test_the_host_never_waits() -> None:
    leaves, ids_TK, grad_TD = _leaves()
    _step(leaves, ids_TK, grad_TD)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(leaves, ids_TK, grad_TD)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_replays_with_another_routing() -> None:
    leaves, ids_TK, grad_TD = _leaves()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _step(leaves, ids_TK, grad_TD)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step(leaves, ids_TK, grad_TD)
    for ids in (torch.zeros_like(ids_TK), ids_TK.flip(0).clone()):
        ids_TK.copy_(ids)
        graph.replay()
        for found, expected in zip(captured, _step(leaves, ids_TK, grad_TD), strict=True):
            assert torch.equal(found, expected)
