"""The forward kernels: up (gathers inside the product), rows times weight, gather-and-sum.

With RANK above zero, up and rows times weight add a low-rank product; see `kernels.triton.triton_lora`.
Offsets that grow with a tensor are 64-bit: rows, experts, and columns of whatever may be strided.

Letters: T tokens, D model width, E experts, K slots a token, R routed rows, F expert width, U = 2F when
gated, else F. In kernels: m rows of a tile, n output columns, k the summed axis.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.triton_activation import activate
from kernels.triton.triton_lora import add_low_rank
from kernels.triton.triton_tiles import (
    narrow,
    product_step,
    rows_times_block,
    store_rows,
    tile_and_column,
    tile_rows,
    weight_block,
)


@triton.jit
def up_kernel(
    x_ptr, w_ptr, bias_ptr, token_ptr, tiles_ptr, h_ptr, a_ptr,
    num_tiles, num_experts, D, F,
    x_t, x_d, w_e, w_u, w_d, bias_e, bias_u,
    low_ptr, factor_ptr, factor_e, factor_r, factor_n,
    ACT: tl.constexpr, GATED: tl.constexpr, ON_VALUE: tl.constexpr,
    BIAS: tl.constexpr, KEEP_H: tl.constexpr, EVEN_K: tl.constexpr,
    RANK: tl.constexpr, BLOCK_L: tl.constexpr, PRECISION: tl.constexpr, RAISE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``h = x[token] @ w_up[e].T + low @ factor[e] + b_up[e]`` and ``a = act(h)``, gate and up together."""
    tile, column = tile_and_column(num_tiles, tl.cdiv(F, BLOCK_N), GROUP)
    expert, first, m, has_row = tile_rows(tiles_ptr, tile, BLOCK_M)
    if expert >= num_experts:
        return
    token = tl.load(token_ptr + first + m, mask=has_row, other=0).to(tl.int64)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    has_n = n < F
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + token[:, None] * x_t + k[None, :].to(tl.int64) * x_d
    w_at = weight_block(w_ptr, expert, w_e, n, w_u, k, w_d)
    to_value = tl.cast(F, tl.int64) * w_u
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    value = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        in_x = has_row[:, None]
        in_w = has_n[None, :]
        if not EVEN_K:
            in_x = in_x & (k[None, :] < D - start)
            in_w = in_w & (k[:, None] < D - start)
        x = tl.load(x_at, mask=in_x, other=0.0)
        gate = product_step(gate, x, tl.load(w_at, mask=in_w, other=0.0), PRECISION, RAISE)
        if GATED:
            other = tl.load(w_at + to_value, mask=in_w, other=0.0)
            value = product_step(value, x, other, PRECISION, RAISE)
        x_at += BLOCK_K * tl.cast(x_d, tl.int64)
        w_at += BLOCK_K * tl.cast(w_d, tl.int64)
    if RANK > 0:
        factor_at = factor_ptr + expert.to(tl.int64) * factor_e + n.to(tl.int64) * factor_n
        gate = add_low_rank(
            gate, low_ptr, factor_at, factor_r, first, m, has_row, has_n, RANK, BLOCK_L, PRECISION, RAISE
        )
        if GATED:
            factor_at += tl.cast(F, tl.int64) * factor_n
            value = add_low_rank(
                value, low_ptr, factor_at, factor_r, first, m, has_row, has_n, RANK, BLOCK_L, PRECISION, RAISE
            )
    if BIAS:
        bias_at = bias_ptr + expert.to(tl.int64) * bias_e + n.to(tl.int64) * bias_u
        gate += tl.load(bias_at, mask=has_n, other=0.0).to(tl.float32)[None, :]
        if GATED:
            bias_at += tl.cast(F, tl.int64) * bias_u
            value += tl.load(bias_at, mask=has_n, other=0.0).to(tl.float32)[None, :]
    inside = has_row[:, None] & has_n[None, :]
    _store_activated(h_ptr, a_ptr, gate, value, first, F, m, n, inside, ACT, GATED, ON_VALUE, KEEP_H, RAISE)


@triton.jit
def _store_activated(
    h_ptr, a_ptr, gate, value, first, F, m, n, inside,
    ACT: tl.constexpr, GATED: tl.constexpr, ON_VALUE: tl.constexpr, KEEP_H: tl.constexpr, RAISE: tl.constexpr,
):  # fmt: skip
    """Writes a tile of H where it is kept, and of ``a = act(h)``."""
    # The activation sees what backward will see: H rounded to its dtype.
    gate = narrow(gate, a_ptr.dtype.element_ty, RAISE).to(tl.float32)
    a = activate(gate, ACT)
    width = 2 * F if GATED else F
    if GATED:
        value = narrow(value, a_ptr.dtype.element_ty, RAISE).to(tl.float32)
        if ON_VALUE:
            a *= activate(value, ACT)
        else:
            a *= value
        if KEEP_H:
            store_rows(h_ptr + F, value, first, width, m, n, inside, RAISE)
    if KEEP_H:
        store_rows(h_ptr, gate, first, width, m, n, inside, RAISE)
    store_rows(a_ptr, a, first, F, m, n, inside, RAISE)


@triton.jit
def rows_kernel(
    a_ptr, b_ptr, bias_ptr, tiles_ptr, out_ptr,
    num_tiles, num_experts, K, N,
    b_e, b_k, b_n, bias_e, bias_n,
    low_ptr, factor_ptr, factor_e, factor_r, factor_n,
    BIAS: tl.constexpr, EVEN_K: tl.constexpr,
    RANK: tl.constexpr, BLOCK_L: tl.constexpr, PRECISION: tl.constexpr, RAISE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``out[r] = a[r] @ b[e] + low[r] @ factor[e] + bias[e]``: down, and the rows of dX."""
    tile, column = tile_and_column(num_tiles, tl.cdiv(N, BLOCK_N), GROUP)
    expert, first, m, has_row = tile_rows(tiles_ptr, tile, BLOCK_M)
    if expert >= num_experts:
        return
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    has_n = n < N
    k = tl.arange(0, BLOCK_K)
    a_at = a_ptr + first.to(tl.int64) * K + (m[:, None] * K + k[None, :])
    b_at = weight_block(b_ptr, expert, b_e, n, b_n, k, b_k)
    acc = rows_times_block(
        a_at, 1, b_at, b_k, K, has_row, has_n, EVEN_K, PRECISION, RAISE, BLOCK_M, BLOCK_N, BLOCK_K
    )
    if RANK > 0:
        factor_at = factor_ptr + expert.to(tl.int64) * factor_e + n.to(tl.int64) * factor_n
        acc = add_low_rank(
            acc, low_ptr, factor_at, factor_r, first, m, has_row, has_n, RANK, BLOCK_L, PRECISION, RAISE
        )
    if BIAS:
        bias_at = bias_ptr + expert.to(tl.int64) * bias_e + n.to(tl.int64) * bias_n
        acc += tl.load(bias_at, mask=has_n, other=0.0).to(tl.float32)[None, :]
    inside = has_row[:, None] & has_n[None, :]
    store_rows(out_ptr, acc, first, N, m, n, inside, RAISE)


@triton.jit
def combine_kernel(
    rows_ptr, weights_ptr, row_ptr, out_ptr,
    T, K, D, num_rows,
    WEIGHTED: tl.constexpr, RAISE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``out[t] = sum_k weights[t, k] * rows[row[t, k]]`` in the order of k, in fp32; row R is no row."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    slot = t.to(tl.int64) * K
    acc = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    for k in range(0, K):
        row = tl.load(row_ptr + slot + k, mask=t < T, other=num_rows).to(tl.int64)
        used = row < num_rows
        at = rows_ptr + row[:, None] * D + d[None, :]
        picked = tl.load(at, mask=used[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        if WEIGHTED:
            weight = tl.load(weights_ptr + slot + k, mask=used, other=0.0).to(tl.float32)
            picked *= weight[:, None]
        acc += picked
    inside = (t < T)[:, None] & (d < D)[None, :]
    at = out_ptr + t.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(at, narrow(acc, out_ptr.dtype.element_ty, RAISE), mask=inside)
