"""The Triton back end in the interpreter: what the contract of all back ends does not ask.

Letters: T tokens, D model width, E experts, K slots a token, R routed rows, F expert width, U = 2F when
gated, else F; G tiles.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import ExpertTensors, LowRank
from kernels.expert_mlp import BACKENDS
from kernels.plan.row_plan import RowPlan, make_plan
from kernels.triton import triton_launch as launch
from kernels.triton.triton_blocks import Target
from kernels.triton.triton_tiles import tile_and_column, tiles_kernel
from tests.kernels.expert_reference import (
    FACTORS,
    NAMES,
    Inputs,
    Sizes,
    assert_agrees,
    make_inputs,
    run_backend,
    run_reference,
)

BIASED = Sizes(T=9, E=3, D=7, F=5, b_up=True, b_down=True)


def _run(inputs: Inputs, plan: RowPlan) -> dict[str, Tensor]:
    leaves = {n: v.detach().requires_grad_() for n, v in inputs.tensors.items()}
    low_rank = LowRank(*(leaves[name] for name in FACTORS), inputs.sizes.scale) if inputs.sizes.rank else None
    function = (inputs.sizes.activation, inputs.sizes.gated)
    experts = ExpertTensors(leaves["w_up"], leaves["w_down"], *function, low_rank=low_rank)
    out_TD = BACKENDS["triton"].run(leaves["x"], leaves["weights"], plan, experts)
    grads = torch.autograd.grad(out_TD, list(leaves.values()), inputs.grad_TD)
    return {"out": out_TD.detach(), **dict(zip(leaves, grads, strict=True))}


def test_the_kernels_are_interpreted() -> None:
    assert launch.is_interpreted()


def test_tiles_worked_by_hand() -> None:
    # Tiles of 2 rows. Expert 0: rows 0-2, so 0-1 and 2; expert 1: none; expert 2: rows 3-7, so 3-4, 5-6
    # and 7; expert 3: row 8; expert 4: none. There can be 9 // 2 + 5 = 9 tiles, and are 6: three name
    # expert 5, who does not exist.
    counts_E = torch.tensor([3, 0, 5, 1, 0])
    ends_E = torch.full((5,), -1, dtype=torch.int32)
    tiles_G3 = torch.full((9, 3), -1, dtype=torch.int32)
    tiles_kernel[(3,)](counts_E, ends_E, tiles_G3, 5, 9, BLOCK_M=2, BLOCK_E=8, BLOCK_G=4)
    assert ends_E.tolist() == [3, 3, 8, 9, 9]
    expected = [[0, 0, 2], [0, 2, 3], [2, 3, 5], [2, 5, 7], [2, 7, 8], [3, 8, 9]]
    assert tiles_G3[:6].tolist() == expected
    assert tiles_G3[6:, 0].tolist() == [5, 5, 5]


@triton.jit
def _pairs_kernel(out_ptr, tiles, columns, GROUP: tl.constexpr):
    tile, column = tile_and_column(tiles, columns, GROUP)
    tl.store(out_ptr + tl.program_id(0), tile * columns + column)


def test_tiles_of_many_experts() -> None:
    # 1024 experts leave room for 16 tiles in a program; every third has 17 rows, so tiles of 16 and of 1.
    counts_E = torch.zeros(1024, dtype=torch.int64)
    counts_E[::3] = 17
    tiles = launch.make_tiles(counts_E, int(counts_E.sum()), Target(0, torch.float32))
    expected = []
    for rank, e in enumerate(range(0, 1024, 3)):
        expected += [[e, 17 * rank, 17 * rank + 16], [e, 17 * rank + 16, 17 * rank + 17]]
    assert tiles.height == 16 and tiles.tiles_G3[: len(expected)].tolist() == expected
    assert (tiles.tiles_G3[len(expected) :, 0] == 1024).all()


@pytest.mark.parametrize(
    ("tiles", "columns", "group"), [(1, 1, 8), (5, 3, 2), (8, 4, 8), (11, 2, 4), (3, 7, 8)]
)
def test_every_tile_meets_every_column_once(tiles: int, columns: int, group: int) -> None:
    found = torch.full((tiles * columns,), -1, dtype=torch.int32)
    _pairs_kernel[(tiles * columns,)](found, tiles, columns, GROUP=group)
    assert sorted(found.tolist()) == list(range(tiles * columns))


@pytest.mark.parametrize(("T", "height"), [(60, 16), (100, 32), (200, 64), (400, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_height_of_tile_agrees(T: int, height: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(Sizes(T=T, K=1, E=2, D=24, F=20)).to(dtype)
    tiles = launch.make_tiles(torch.tensor([T // 2, T - T // 2]), T, Target(0, dtype))
    assert tiles.height == height
    assert_agrees("triton", inputs, run_reference(inputs.to(torch.float64)), NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_longer_than_a_block_agree(dtype: torch.dtype) -> None:
    # Two and a half steps of every sum, a token that meets an expert twice, an expert without rows.
    inputs = make_inputs(Sizes(T=20, K=4, E=3, D=80, F=72, b_up=True, b_down=True)).to(dtype)
    inputs = replace(inputs, ids_TK=torch.where(inputs.ids_TK == 1, 2, inputs.ids_TK))
    assert_agrees("triton", inputs, run_reference(inputs.to(torch.float64)), NAMES, slack=0.0)


@functools.cache
def _biased() -> dict[str, Tensor]:
    return run_backend("triton", make_inputs(BIASED).to(torch.float32))


@pytest.mark.parametrize("wanted", [(), *((name,) for name in NAMES), ("w_up", "b_down"), ("x", "weights")])
def test_what_is_frozen_changes_nothing_else(wanted: tuple[str, ...]) -> None:
    some = run_backend("triton", make_inputs(BIASED).to(torch.float32), wanted)
    assert set(some) == {"out", *wanted}
    assert all(torch.equal(some[key], _biased()[key]) for key in some)


@pytest.mark.parametrize("rank", [0, 3])
def test_rows_past_the_last_expert_are_never_read(rank: int) -> None:
    inputs = make_inputs(Sizes(rank=rank)).to(torch.float32)
    T, D, K = inputs.sizes.T, inputs.sizes.D, inputs.sizes.K
    plan = make_plan(inputs.ids_TK, inputs.sizes.E)
    expected = _run(inputs, plan)
    # A token of NaN that no slot of another is in; rows that no expert owns point to it.
    nan = {"x": torch.full((1, D), torch.nan), "weights": torch.full((1, K), torch.nan)}
    longer = {n: torch.cat([v, nan[n]]) if n in nan else v for n, v in inputs.tensors.items()}
    unused = torch.full((1, K), plan.num_rows + 2)
    padded = RowPlan(
        token_R=torch.cat([plan.token_R, torch.tensor([T, T])]),
        slot_R=torch.cat([plan.slot_R, torch.tensor([T * K, T * K])]),
        row_TK=torch.cat([plan.row_TK, unused]),
        counts_E=plan.counts_E,
        has_unused=True,
    )
    grad_TD = torch.cat([inputs.grad_TD, nan["x"]])
    found = _run(replace(inputs, tensors=longer, grad_TD=grad_TD), padded)
    for key, value in expected.items():
        assert torch.equal(found[key][: len(value)], value), key
    assert found["out"][T].abs().sum() == 0 and found["weights"][T].abs().sum() == 0


def _far(value: Tensor) -> Tensor:
    """The same numbers, the first axis 2^30 elements apart: memory that is never touched costs nothing."""
    stride = 2**30
    span = stride * (value.shape[0] - 1) + value[0].numel()
    inner = value[0].contiguous().stride()
    far = torch.empty(span, dtype=value.dtype).as_strided(value.shape, (stride, *inner))
    return far.copy_(value)


@pytest.mark.parametrize("name", ["x", "w_up", "w_down", "grad", "low_b_up", "low_a_down"])
def test_strides_beyond_32_bits(name: str) -> None:
    # Three tokens and three experts: offsets 0, 2^30 and 2^31, the last above what int32 holds.
    rank = 2 if name.startswith("low") else 0
    inputs = make_inputs(Sizes(T=3, E=3, rank=rank)).to(torch.bfloat16)
    inputs = replace(inputs, ids_TK=torch.tensor([[0, 1], [1, 2], [2, 0]]))
    expected = run_backend("triton", inputs)
    if name == "grad":
        inputs = replace(inputs, grad_TD=_far(inputs.grad_TD))
    else:
        inputs = replace(inputs, tensors={**inputs.tensors, name: _far(inputs.tensors[name])})
    found = run_backend("triton", inputs)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("gated", [True, False])
def test_rows_beyond_32_bits(gated: bool) -> None:
    # Row 4 200 000 of H starts at element 4.2e6 * 512 = 2.2e9, ungated A too; no other row is ever touched.
    first, U, D, n = 4_200_000, 512, 4, 3
    F = U // 2 if gated else U
    g = torch.Generator().manual_seed(0)
    x_TD = torch.randn(1, D, generator=g).bfloat16()
    w_up_EUD = torch.randn(1, U, D, generator=g).bfloat16()
    w_down_EDF = torch.randn(1, D, F, generator=g).bfloat16()
    a_EDr, b_ErU = (torch.randn(1, *shape, generator=g).bfloat16() for shape in ((D, 3), (3, U)))
    token_R = torch.zeros(first + n, dtype=torch.int64)
    weights_TK = torch.tensor([[0.5]])
    tiles_G3 = torch.tensor([[0, 0, n]], dtype=torch.int32)
    ends_E = torch.tensor([n], dtype=torch.int32)
    near = launch.Tiles(tiles_G3, ends_E, 16, Target(0, torch.bfloat16))
    far = replace(near, tiles_G3=tiles_G3 + torch.tensor([0, first, first], dtype=torch.int32))
    results = []
    for tiles, start in ((near, 0), (far, first)):
        rows = token_R[: start + n]
        z_Rr = launch.low_rows(launch.Side(x_TD, True), a_EDr, 0.5, rows, tiles)
        gating = launch.Gating("silu", gated)
        h_RU, a_RF = launch.up(x_TD, w_up_EUD, None, rows, tiles, gating, True, launch.LowTerm(z_Rr, b_ErU))
        y_RD = launch.rows_times(a_RF, w_down_EDF.transpose(1, 2), None, tiles)
        dh_RU, sa_RF, dots_R = launch.down_backward(
            x_TD, w_down_EDF, None, weights_TK, rows, rows, tiles, h_RU, gating
        )
        v_Rr = launch.low_rows(launch.Side(dh_RU, False), b_ErU.transpose(1, 2), 0.5, rows, tiles)
        results.append([v[start:].clone() for v in (z_Rr, h_RU, a_RF, y_RD, dh_RU, sa_RF, dots_R, v_Rr)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
