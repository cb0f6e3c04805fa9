"""The routing kernels in the interpreter: the plan of a stable sort, to the last number.

Letters: T tokens, E experts, K slots a token, R routed rows.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from triton.runtime.interpreter import interpreter_builder

from kernels.plan.row_plan import sorted_route
from kernels.plan.triton_route import route, scan_kernel
from kernels.triton.triton_blocks import Target, candidates
from kernels.tune import GpuTimer, Layer, cases
from moe.dispatch.local import LocalDispatcher
from moe.experts.experts import Experts
from moe.experts.weights import ExpertBank
from moe.layer import MoELayer
from tests.moe.routers.routing_cases import ROUTER_CONFIGS, batch_fields, make_context, make_router


def test_worked_by_hand_with_unused_slots() -> None:
    # Flat slots 0 to 5; used are 0 (expert 2), 2 (expert 0), 3 (expert 2) and 5 (expert 1), so rows 0 to 3
    # are slots 2, 5, 0, 3. With R = 6 the unused slots 1 and 4 fill rows 4 and 5, and R marks them in row_TK.
    ids_TK = torch.tensor([[2, 999], [0, 2], [-5, 1]])
    mask_TK = torch.tensor([[True, False], [True, True], [False, True]])
    slot_R, token_R, row_TK, counts_E = route(ids_TK, mask_TK, 4, 6)
    assert slot_R.tolist() == [2, 5, 0, 3, 1, 4]
    assert token_R.tolist() == [1, 2, 0, 1, 0, 2]
    assert row_TK.tolist() == [[2, 6], [0, 3], [6, 1]]
    assert counts_E.tolist() == [1, 1, 2, 0]
    # Where the host knows that four are used.
    slot_R, token_R, row_TK, _ = route(ids_TK, mask_TK, 4, 4)
    assert (slot_R.tolist(), token_R.tolist()) == ([2, 5, 0, 3], [1, 2, 0, 1])
    assert row_TK.tolist() == [[2, 4], [0, 3], [4, 1]]


# No token; one; one expert; more slots than a block, not a multiple of it; more experts than a program looks
# at together.
SIZES = [(0, 2, 3), (1, 1, 4), (300, 1, 1), (100, 3, 7), (40, 4, 70), (64, 2, 32)]


@pytest.mark.parametrize(("T", "K", "E"), SIZES)
def test_equals_the_stable_sort(T: int, K: int, E: int) -> None:
    g = torch.Generator().manual_seed(T)
    # Uneven, and some without a row.
    ids_TK = (torch.rand(T, K, generator=g).square() * E).long()
    mask_TK = torch.rand(T, K, generator=g) < 0.7
    used = int(mask_TK.sum())
    nonsense_TK = ids_TK.masked_fill(~mask_TK, -(2**40))
    for ids, mask, num_rows in (
        (ids_TK, None, T * K),
        (nonsense_TK, mask_TK, T * K),
        (nonsense_TK, mask_TK, used),
        (nonsense_TK, torch.zeros_like(mask_TK), T * K),
    ):
        found, expected = route(ids, mask, E, num_rows), sorted_route(ids, mask, E, num_rows)
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b), (mask is None, num_rows)


def test_blocks_of_slots_are_added_up_in_order() -> None:
    # Three steps of 128 blocks, and two programs of four bins.
    counts_BW = torch.randint(0, 5, (300, 5), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    found_BW, totals_W = counts_BW.clone(), torch.full((5,), -1)
    scan_kernel[(2,)](found_BW, totals_W, 300, 5, BLOCK_B=128, BLOCK_E=4)
    assert torch.equal(found_BW, (counts_BW.cumsum(0) - counts_BW).int())
    assert torch.equal(totals_W, counts_BW.sum(0))


def test_every_launch_that_is_tuned_runs_with_every_candidate() -> None:
    layer = Layer(tokens=9, experts=3, top_k=2, model_width=20, expert_width=12)
    target = Target(0, torch.float16)
    timer = GpuTimer(layer, target, torch.device("cpu"), rounds=1)
    found = cases(layer, target)
    assert [case.name for case in found] == ["up", "down", "dx", "dh", "dw_up", "dw_down"]
    for case in found:
        results = []
        for blocks in candidates(case.kind, case.height, target)[:3]:
            torch.manual_seed(0)
            result = timer.run_of(case, replace(target, tuned={case.bucket: blocks}))()
            results.append(result[0] if isinstance(result, tuple) else result)
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=0, atol=1e-2, msg=case.name)


@pytest.mark.parametrize("router", ["topk", "dselect_k"])
def test_a_layer_compiles_without_a_break(router: str) -> None:
    # topk uses every slot; dselect_k leaves some unused, so the traced plan is padded.
    config = next(config for config in ROUTER_CONFIGS if config.name == router)
    bank = ExpertBank(torch.randn(4, 24, 8), torch.randn(4, 8, 12), "silu", True)
    made, context = make_router(config, 8, 4), make_context(**batch_fields(9, 4))
    layer = MoELayer(made, LocalDispatcher(), Experts(bank, "triton"), context)
    results = []
    for forward in (layer, torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")):
        x_TD = torch.randn(9, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out_TD = forward(x_TD)
        results.append([out_TD, *torch.autograd.grad(out_TD.square().sum(), [x_TD])])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("ids", "used", "num_rows", "message"),
    [
        ([0, 3], None, 2, "an expert id is out of bounds"),
        ([-1, 0], None, 2, "an expert id is out of bounds"),
        ([2**32, 0], None, 2, "an expert id is out of bounds"),
        ([0, -1], [True, True], 2, "an expert id is out of bounds"),
        ([0, 3], [True, True], 2, "an expert id is out of bounds"),
        ([0, 2], [True, True], 1, "more slots are used than there are rows"),
    ],
)
def test_the_device_stops_at_a_wrong_id(
    ids: list[int], used: list[bool] | None, num_rows: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The interpreter checks what a device is told to only with this option.
    monkeypatch.setattr(interpreter_builder, "options", replace(interpreter_builder.options, debug=True))
    mask_TK = None if used is None else torch.tensor([used])
    with pytest.raises(Exception, match=message):
        route(torch.tensor([ids]), mask_TK, 3, num_rows)
