"""Tiles of routed rows, cut on the device without atomics or a copy to the host, and products over a tile.

A tile is up to ``BLOCK_M`` neighbouring rows of one expert. Only the device knows how many tiles there are,
so kernels launch the largest possible number of programs, and those past the last tile return at once.

MATH says how kernels multiply and round: ``ieee`` and ``tf32`` are precisions of fp32 products; ``emulated``
is bf16 in the interpreter, which can neither multiply nor round it.

Letters: E experts, R routed rows, G tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tiles_kernel(
    counts_ptr, ends_ptr, tiles_ptr,
    num_experts, num_tiles,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Writes ``ends_E`` and, for BLOCK_G tiles, the row ``(expert, first row, row after the last)``.

    Every program repeats the prefix sum over experts: E numbers are cheaper than a second launch. Tiles that
    do not exist get the expert E.
    """
    expert = tl.arange(0, BLOCK_E)
    count = tl.load(counts_ptr + expert, mask=expert < num_experts, other=0).to(tl.int32)
    end = tl.cumsum(count, 0)
    tiles_of = (count + BLOCK_M - 1) // BLOCK_M
    tile_end = tl.cumsum(tiles_of, 0)
    if tl.program_id(0) == 0:
        tl.store(ends_ptr + expert, end, mask=expert < num_experts)
    tile = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    # The owner is the first expert whose tiles end past this one: as many experts end before it.
    is_before = (tile_end[None, :] <= tile[:, None]) & (expert < num_experts)[None, :]
    owner = tl.sum(is_before.to(tl.int32), 1)
    is_owner = expert[None, :] == owner[:, None]
    # Row r of the owner's tile j is end - count + j * BLOCK_M, with j = tile - (tile_end - tiles_of).
    base = end - count - (tile_end - tiles_of) * BLOCK_M
    first = tl.sum(tl.where(is_owner, base[None, :], 0), 1) + tile * BLOCK_M
    last = tl.sum(tl.where(is_owner, end[None, :], 0), 1)
    exists = tile < num_tiles
    tl.store(tiles_ptr + 3 * tile, owner, mask=exists)
    tl.store(tiles_ptr + 3 * tile + 1, first, mask=exists)
    tl.store(tiles_ptr + 3 * tile + 2, tl.minimum(first + BLOCK_M, last), mask=exists)


@triton.jit
def tile_and_column(num_tiles, num_columns, GROUP: tl.constexpr):
    """Returns the tile and the block of columns that a program of a one-dimensional grid computes.

    Programs that run at the same time share GROUP tiles and few blocks of columns, so that both the rows
    and the expert's weights are read from cache.
    """
    program = tl.program_id(0)
    group = program // (GROUP * num_columns)
    first = group * GROUP
    height = tl.minimum(num_tiles - first, GROUP)
    within = program - first * num_columns
    return first + within % height, within // height


@triton.jit
def program_tile(
    tiles_ptr, num_tiles, N, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Returns what a program computes; the expert is E in programs past the last tile.

    In order: the expert, its first row, rows m, which of them exist, the block of columns, columns n, which
    of them exist.
    """
    tile, column = tile_and_column(num_tiles, tl.cdiv(N, BLOCK_N), GROUP)
    expert = tl.load(tiles_ptr + 3 * tile)
    first = tl.load(tiles_ptr + 3 * tile + 1)
    m = tl.arange(0, BLOCK_M)
    has_row = m < tl.load(tiles_ptr + 3 * tile + 2) - first
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    return expert, first, m, has_row, column, n, n < N


@triton.jit
def weight_block(w_ptr, expert, w_e, n, w_n, k, w_k):
    """Returns the addresses ``[k, n]`` of a block of an expert's weight."""
    w_at = w_ptr + expert.to(tl.int64) * w_e
    return w_at + (n[None, :].to(tl.int64) * w_n + k[:, None].to(tl.int64) * w_k)


@triton.jit
def rows_times_block(
    a_at, a_k, b_at, b_k, to_second, K, has_row, has_n,
    TWO: tl.constexpr, EVEN_K: tl.constexpr, MATH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Returns ``a[m, :] @ b[:, n]`` in fp32 and, with TWO, the product with the second b; else zeros.

    `a_at` and `b_at` are addresses of the first block along the summed axis, `a_k` and `b_k` the steps along
    it, and `to_second` is the distance of the second b. Both products read a once.
    """
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        in_a = has_row[:, None]
        in_b = has_n[None, :]
        if not EVEN_K:
            in_a = in_a & (k[None, :] < K - start)
            in_b = in_b & (k[:, None] < K - start)
        a = tl.load(a_at, mask=in_a, other=0.0)
        acc = product_step(acc, a, tl.load(b_at, mask=in_b, other=0.0), MATH)
        if TWO:
            second = product_step(second, a, tl.load(b_at + to_second, mask=in_b, other=0.0), MATH)
        a_at += BLOCK_K * tl.cast(a_k, tl.int64)
        b_at += BLOCK_K * tl.cast(b_k, tl.int64)
    return acc, second


@triton.jit
def product_step(acc, a, b, MATH: tl.constexpr):
    """Returns ``acc + a @ b`` in fp32."""
    if MATH == "emulated":
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc, input_precision=MATH)
    return acc


@triton.jit
def narrow(x, dtype: tl.constexpr, MATH: tl.constexpr):
    """Rounds fp32 to the nearest value of `dtype`, ties to even.

    The interpreter truncates to bf16 where a GPU rounds, so emulation rounds the bits first; NaN stays NaN.
    """
    if MATH == "emulated":
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def store_rows(ptr, value, first, width, m, n, inside, MATH: tl.constexpr):
    """Writes a tile of a contiguous matrix, rows ``first + m`` and columns n, rounded to its dtype.

    The start of a tile is a 64-bit offset; within it 32 bits suffice, at half the registers.
    """
    at = ptr + first.to(tl.int64) * width + (m[:, None] * width + n[None, :])
    tl.store(at, narrow(value, ptr.dtype.element_ty, MATH), mask=inside)
