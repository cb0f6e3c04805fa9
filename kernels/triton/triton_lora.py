"""Low-rank factors beside the weights (LoRA, arXiv 2106.09685): ``W x + s B (A x)`` without a matrix ``B A``.

Each side is two products of rank r. The first has few columns and is a kernel of its own, which writes
``low = s A x`` for every row; the second has a short sum and is added inside the kernel that multiplies by W,
to the same accumulators.

In kernels: m rows of a tile, n output columns, k the summed axis, j the rank.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.triton_tiles import (
    product_step,
    program_tile,
    rows_times_block,
    store_rows,
    weight_block,
)


@triton.jit
def add_low_rank(
    acc, low_ptr, factor_ptr, factor_strides, expert, n, first, m, has_row, has_n,
    RANK: tl.constexpr, BLOCK_L: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """Returns ``acc + low[first + m] @ factor[expert, :, n]``."""
    factor_e, factor_r, factor_n = factor_strides
    j = tl.arange(0, BLOCK_L)
    low_at = low_ptr + first.to(tl.int64) * RANK + (m[:, None] * RANK + j[None, :])
    factor_at = weight_block(factor_ptr, expert, factor_e, n, factor_n, j, factor_r)
    for start in range(0, RANK, BLOCK_L):
        in_low = has_row[:, None]
        in_factor = has_n[None, :]
        if RANK % BLOCK_L != 0:
            in_low = in_low & (j[None, :] < RANK - start)
            in_factor = in_factor & (j[:, None] < RANK - start)
        low = tl.load(low_at, mask=in_low, other=0.0)
        acc = product_step(acc, low, tl.load(factor_at, mask=in_factor, other=0.0), MATH)
        low_at += BLOCK_L
        factor_at += BLOCK_L * tl.cast(factor_r, tl.int64)
    return acc


@triton.jit
def low_kernel(
    a_ptr, b_ptr, token_ptr, tiles_ptr, out_ptr,
    num_tiles, num_experts, K, N, scale,
    a_strides, b_strides,
    GATHER: tl.constexpr, EVEN_K: tl.constexpr, MATH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Writes ``out[r] = scale * a[r] @ b[e]`` for few columns, or from ``a[token[r]]`` with GATHER."""
    expert, first, m, has_row, _, n, has_n = program_tile(tiles_ptr, num_tiles, N, GROUP, BLOCK_M, BLOCK_N)
    if expert >= num_experts:
        return
    a_r, a_k = a_strides
    b_e, b_k, b_n = b_strides
    row = first.to(tl.int64) + m
    if GATHER:
        row = tl.load(token_ptr + row, mask=has_row, other=0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    a_at = a_ptr + row[:, None] * a_r + k[None, :].to(tl.int64) * a_k
    b_at = weight_block(b_ptr, expert, b_e, n, b_n, k, b_k)
    acc, _ = rows_times_block(
        a_at, a_k, b_at, b_k, 0, K, has_row, has_n, False, EVEN_K, MATH, BLOCK_M, BLOCK_N, BLOCK_K
    )
    inside = has_row[:, None] & has_n[None, :]
    store_rows(out_ptr, acc * scale, first, N, m, n, inside, MATH)
