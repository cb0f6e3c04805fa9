"""Forward kernels: up (gathers inside the product), rows times weight, gather-and-sum.

Up and rows times weight add a low-rank product where they are given one; see `kernels.triton.triton_lora`.
Offsets that grow with a tensor are 64-bit: those of rows, of experts, and of columns with any stride.
``*_strides`` hold a tensor's strides in the order of its axes.

Letters: T tokens, D model width, E experts, K slots a token, R routed rows, F expert width, U = 2F when
gated, else F. In kernels: m rows of a tile, n output columns, k the summed axis.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.triton_activation import activate
from kernels.triton.triton_lora import add_low_rank
from kernels.triton.triton_tiles import narrow, program_tile, rows_times_block, store_rows, weight_block


@triton.jit
def add_bias(acc, bias_ptr, bias_strides, expert, n, has_n):
    """Returns ``acc + bias[expert, n]``."""
    bias_e, bias_n = bias_strides
    bias_at = bias_ptr + expert.to(tl.int64) * bias_e + n.to(tl.int64) * bias_n
    return acc + tl.load(bias_at, mask=has_n, other=0.0).to(tl.float32)[None, :]


@triton.jit
def up_kernel(
    x_ptr, w_ptr, bias_ptr, token_ptr, tiles_ptr, h_ptr, a_ptr,
    num_tiles, num_experts, D, F,
    x_strides, w_strides, bias_strides,
    low_ptr, factor_ptr, factor_strides,
    ACT: tl.constexpr, GATED: tl.constexpr, ON_VALUE: tl.constexpr, KEEP_H: tl.constexpr,
    RANK: tl.constexpr, BLOCK_L: tl.constexpr, EVEN_K: tl.constexpr, MATH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Writes ``h = x[token] @ w_up[e].T + low @ factor[e] + b_up[e]`` and ``a = act(h)``."""
    expert, first, m, has_row, _, n, has_n = program_tile(tiles_ptr, num_tiles, F, GROUP, BLOCK_M, BLOCK_N)
    if expert >= num_experts:
        return
    x_t, x_d = x_strides
    w_e, w_u, w_d = w_strides
    token = tl.load(token_ptr + first + m, mask=has_row, other=0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + token[:, None] * x_t + k[None, :].to(tl.int64) * x_d
    w_at = weight_block(w_ptr, expert, w_e, n, w_u, k, w_d)
    gate, value = rows_times_block(
        x_at, x_d, w_at, w_d, tl.cast(F, tl.int64) * w_u, D, has_row, has_n,
        GATED, EVEN_K, MATH, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if low_ptr is not None:
        gate = add_low_rank(
            gate, low_ptr, factor_ptr, factor_strides, expert, n, first, m, has_row, has_n,
            RANK, BLOCK_L, MATH,
        )  # fmt: skip
        if GATED:
            value = add_low_rank(
                value, low_ptr, factor_ptr, factor_strides, expert, F + n, first, m, has_row, has_n,
                RANK, BLOCK_L, MATH,
            )  # fmt: skip
    if bias_ptr is not None:
        gate = add_bias(gate, bias_ptr, bias_strides, expert, n, has_n)
        if GATED:
            value = add_bias(value, bias_ptr, bias_strides, expert, F + n, has_n)
    inside = has_row[:, None] & has_n[None, :]
    _store_activated(h_ptr, a_ptr, gate, value, first, F, m, n, inside, ACT, GATED, ON_VALUE, KEEP_H, MATH)


@triton.jit
def _store_activated(
    h_ptr, a_ptr, gate, value, first, F, m, n, inside,
    ACT: tl.constexpr, GATED: tl.constexpr, ON_VALUE: tl.constexpr, KEEP_H: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """Writes a tile of ``a = act(h)``, and of H with KEEP_H."""
    # The activation sees what backward will see: H rounded to its dtype.
    gate = narrow(gate, a_ptr.dtype.element_ty, MATH).to(tl.float32)
    a = activate(gate, ACT)
    width = 2 * F if GATED else F
    if GATED:
        value = narrow(value, a_ptr.dtype.element_ty, MATH).to(tl.float32)
        if ON_VALUE:
            a *= activate(value, ACT)
        else:
            a *= value
        if KEEP_H:
            store_rows(h_ptr + F, value, first, width, m, n, inside, MATH)
    if KEEP_H:
        store_rows(h_ptr, gate, first, width, m, n, inside, MATH)
    store_rows(a_ptr, a, first, F, m, n, inside, MATH)


@triton.jit
def rows_kernel(
    a_ptr, b_ptr, bias_ptr, tiles_ptr, out_ptr,
    num_tiles, num_experts, K, N,
    b_strides, bias_strides,
    low_ptr, factor_ptr, factor_strides,
    RANK: tl.constexpr, BLOCK_L: tl.constexpr, EVEN_K: tl.constexpr, MATH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Writes ``out[r] = a[r] @ b[e] + low[r] @ factor[e] + bias[e]``: down, and the rows of dX."""
    expert, first, m, has_row, _, n, has_n = program_tile(tiles_ptr, num_tiles, N, GROUP, BLOCK_M, BLOCK_N)
    if expert >= num_experts:
        return
    b_e, b_k, b_n = b_strides
    k = tl.arange(0, BLOCK_K)
    a_at = a_ptr + first.to(tl.int64) * K + (m[:, None] * K + k[None, :])
    b_at = weight_block(b_ptr, expert, b_e, n, b_n, k, b_k)
    acc, _ = rows_times_block(
        a_at, 1, b_at, b_k, 0, K, has_row, has_n, False, EVEN_K, MATH, BLOCK_M, BLOCK_N, BLOCK_K
    )
    if low_ptr is not None:
        acc = add_low_rank(
            acc, low_ptr, factor_ptr, factor_strides, expert, n, first, m, has_row, has_n, RANK, BLOCK_L, MATH
        )  # fmt: skip
    if bias_ptr is not None:
        acc = add_bias(acc, bias_ptr, bias_strides, expert, n, has_n)
    inside = has_row[:, None] & has_n[None, :]
    store_rows(out_ptr, acc, first, N, m, n, inside, MATH)


@triton.jit
def combine_kernel(
    rows_ptr, weights_ptr, row_ptr, out_ptr,
    T, K, D, num_rows,
    MATH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes ``out[t] = sum_k weights[t, k] * rows[row[t, k]]`` in the order of k, in fp32; row R is no row.

    Without `weights_ptr` all weights are one.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    slot = t.to(tl.int64) * K
    acc = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    for k in range(0, K):
        row = tl.load(row_ptr + slot + k, mask=t < T, other=num_rows).to(tl.int64)
        used = row < num_rows
        at = rows_ptr + row[:, None] * D + d[None, :]
        picked = tl.load(at, mask=used[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + slot + k, mask=used, other=0.0).to(tl.float32)
            picked *= weight[:, None]
        acc += picked
    inside = (t < T)[:, None] & (d < D)[None, :]
    at = out_ptr + t.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(at, narrow(acc, out_ptr.dtype.element_ty, MATH), mask=inside)
