"""What only a GPU can show of the Triton back end: no waiting for the host, and replay of a captured graph.

The contract of all back ends runs on the GPU besides, wherever there is one.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.backend import ExpertTensors, LowRank, MainGrads
from kernels.expert_mlp import BACKENDS
from kernels.plan.row_plan import make_plan, route, sorted_route
from kernels.triton.tuned_blocks import VARIABLE, tuned_blocks
from kernels.tune import main
from tests.kernels.expert_reference import Sizes, make_inputs, workload

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
SIZES = Sizes(T=300, K=4, E=8, D=128, F=96)
MASKED = pytest.mark.parametrize("masked", [False, True])
# With a rank, the weights' gradients are added to fp32 buffers besides.
RANKS = pytest.mark.parametrize("rank", [0, 16])


def _leaves(rank: int = 0, device: str = "cuda") -> tuple[list[Tensor], Tensor, Tensor]:
    sizes = replace(SIZES, rank=rank)
    unsupported_reason = BACKENDS["triton"].unsupported_reason(
        workload(sizes, torch.bfloat16, device, accumulates=rank > 0)
    )
    if unsupported_reason is not None:
        pytest.skip(unsupported_reason)
    inputs = make_inputs(sizes).to(torch.bfloat16, device)
    return [v.requires_grad_() for v in inputs.tensors.values()], inputs.ids_TK, inputs.grad_TD


def _step(
    leaves: list[Tensor], ids_TK: Tensor, grad_TD: Tensor, mask_TK: Tensor | None = None
) -> list[Tensor]:
    x_TD, weights_TK, w_up_EUD, w_down_EDF, *factors = leaves
    low_rank, main, buffers = None, None, []
    if factors:
        low_rank = LowRank(*factors, 0.5)
        buffers = [torch.zeros_like(w, dtype=torch.float32) for w in (w_up_EUD, w_down_EDF)]
        main = MainGrads(*buffers)
    experts = ExpertTensors(w_up_EUD, w_down_EDF, "silu", True, low_rank=low_rank, main_grads=main)
    out_TD = BACKENDS["triton"].run(x_TD, weights_TK, make_plan(ids_TK, SIZES.E, mask_TK), experts)
    grads = torch.autograd.grad(out_TD, leaves, grad_TD, allow_unused=bool(factors))
    assert [grad is None for grad in grads] == [False, False, *[bool(factors)] * 2, *[False] * len(factors)]
    return [out_TD, *(grad for grad in grads if grad is not None), *buffers]


def _mask(ids_TK: Tensor, masked: bool) -> Tensor | None:
    return torch.arange(ids_TK.numel(), device="cuda").view_as(ids_TK) % 3 > 0 if masked else None


@RANKS
@MASKED
def test_the_host_never_waits(rank: int, masked: bool) -> None:
    leaves, ids_TK, grad_TD = _leaves(rank)
    mask_TK = _mask(ids_TK, masked)
    _step(leaves, ids_TK, grad_TD, mask_TK)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(leaves, ids_TK, grad_TD, mask_TK)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@RANKS
@MASKED
def test_a_captured_graph_replays_with_another_routing(rank: int, masked: bool) -> None:
    leaves, ids_TK, grad_TD = _leaves(rank)
    mask_TK = _mask(ids_TK, masked)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _step(leaves, ids_TK, grad_TD, mask_TK)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step(leaves, ids_TK, grad_TD, mask_TK)
    for ids in (torch.zeros_like(ids_TK), ids_TK.flip(0).clone()):
        ids_TK.copy_(ids)
        if mask_TK is not None:
            mask_TK.logical_not_()
        graph.replay()
        for found, expected in zip(captured, _step(leaves, ids_TK, grad_TD, mask_TK), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize(("T", "K", "E"), [(0, 2, 3), (1, 1, 1), (77, 3, 5), (5000, 8, 64), (40000, 8, 300)])
@MASKED
def test_slots_are_routed_as_by_the_sort(T: int, K: int, E: int, masked: bool) -> None:
    _leaves()
    ids_TK = (torch.rand(T, K, device="cuda").square() * E).long()
    mask_TK = _mask(ids_TK, masked)
    found = route(ids_TK, mask_TK, E, T * K)
    expected = sorted_route(ids_TK, mask_TK, E, T * K)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_blocks_are_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _leaves()
    path, sizes = tmp_path / "blocks.json", {"tokens": SIZES.T, "experts": SIZES.E, "top-k": SIZES.K}
    sizes |= {"model-width": SIZES.D, "expert-width": SIZES.F, "rounds": 2}
    arguments = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    assert main([*arguments, "--out", str(path)]) == 0
    monkeypatch.setenv(VARIABLE, str(path))
    # Six launches; the two gradients of weights share a bucket where D and F round to one power of two.
    assert len(tuned_blocks(torch.device("cuda", 0), torch.bfloat16)) >= 5
    first, second = _step(*_leaves()), _step(*_leaves())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
