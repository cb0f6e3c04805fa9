"""Backward kernels: dH with everything that follows from it elementwise, and dW.

With ``dA' = dO W_down`` and the combine weight s of a row: ``ds = <dA', A>``, ``dA = s dA'`` and
``dH = dA f'(H)``. A is recomputed from H, and ``s A`` is written as the operand of dW_down, so that neither Y
nor its gradient exists (as in SonicMoE, arXiv 2512.14080). The rows of dX come from
`kernels.triton.triton_forward.rows_kernel`. With low-rank factors dA' is the sum of two products; the rest is
the same.

Letters: T tokens, D model width, E experts, R routed rows, F expert width, U = 2F when gated, else F. In
kernels: m rows of a tile, n output columns, k the summed axis, p and q the axes of a weight's gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.triton_activation import activate, slope
from kernels.triton.triton_lora import add_low_rank
from kernels.triton.triton_tiles import (
    narrow,
    product_step,
    program_tile,
    rows_times_block,
    store_rows,
    tile_and_column,
    weight_block,
)


@triton.jit
def dh_kernel(
    grad_ptr, w_ptr, bias_ptr, token_ptr, slot_ptr, weights_ptr, tiles_ptr, h_ptr, dh_ptr, sa_ptr, dots_ptr,
    num_tiles, num_experts, num_rows, D, F,
    grad_strides, w_strides, bias_strides,
    low_ptr, factor_ptr, factor_strides,
    ACT: tl.constexpr, GATED: tl.constexpr, ON_VALUE: tl.constexpr,
    RANK: tl.constexpr, BLOCK_L: tl.constexpr, EVEN_K: tl.constexpr, MATH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Writes dH, ``s A``, and this block of columns' part of ``<dA', A>`` (and of ``<dO, b_down>``)."""
    expert, first, m, has_row, column, n, has_n = program_tile(
        tiles_ptr, num_tiles, F, GROUP, BLOCK_M, BLOCK_N
    )
    if expert >= num_experts:
        return
    grad_t, grad_d = grad_strides
    w_e, w_d, w_f = w_strides
    token = tl.load(token_ptr + first + m, mask=has_row, other=0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    dots = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if bias_ptr is not None:  # noqa: SIM102, one is decided by the compiler
        # The bias is part of Y: it enters ds once, with the first block of columns.
        if column == 0:
            bias_e, bias_d = bias_strides
            bias_at = bias_ptr + expert.to(tl.int64) * bias_e
            for start in range(0, D, BLOCK_K):
                d = start + k
                bias = tl.load(bias_at + d.to(tl.int64) * bias_d, mask=d < D, other=0.0).to(tl.float32)
                at = grad_ptr + token[:, None] * grad_t + d[None, :].to(tl.int64) * grad_d
                grad = tl.load(at, mask=has_row[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
                dots += tl.sum(grad * bias[None, :], 1)
    grad_at = grad_ptr + token[:, None] * grad_t + k[None, :].to(tl.int64) * grad_d
    w_at = weight_block(w_ptr, expert, w_e, n, w_f, k, w_d)
    acc, _ = rows_times_block(
        grad_at, grad_d, w_at, w_d, 0, D, has_row, has_n, False, EVEN_K, MATH, BLOCK_M, BLOCK_N, BLOCK_K
    )
    if low_ptr is not None:
        acc = add_low_rank(
            acc, low_ptr, factor_ptr, factor_strides, expert, n, first, m, has_row, has_n, RANK, BLOCK_L, MATH
        )  # fmt: skip
    inside = has_row[:, None] & has_n[None, :]
    slot = tl.load(slot_ptr + first + m, mask=has_row, other=0)
    scale = tl.load(weights_ptr + slot, mask=has_row, other=0.0).to(tl.float32)[:, None]
    dots += _store_backward(
        acc, scale, h_ptr, dh_ptr, sa_ptr, first, F, m, n, inside, ACT, GATED, ON_VALUE, MATH
    )
    tl.store(dots_ptr + column.to(tl.int64) * num_rows + first + m, dots, mask=has_row)


@triton.jit
def _store_backward(
    da, scale, h_ptr, dh_ptr, sa_ptr, first, F, m, n, inside,
    ACT: tl.constexpr, GATED: tl.constexpr, ON_VALUE: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """Writes a tile of dH and of ``s A`` from ``da = dA'`` and H; returns its part of ``<dA', A>``."""
    width = 2 * F if GATED else F
    h_at = h_ptr + first.to(tl.int64) * width + (m[:, None] * width + n[None, :])
    gate = tl.load(h_at, mask=inside, other=0.0).to(tl.float32)
    a = activate(gate, ACT)
    dgate = da * slope(gate, ACT)
    if GATED:
        value = tl.load(h_at + F, mask=inside, other=0.0).to(tl.float32)
        dvalue = da * a
        if ON_VALUE:
            dvalue *= slope(value, ACT)
            value = activate(value, ACT)
        store_rows(dh_ptr + F, dvalue * scale, first, width, m, n, inside, MATH)
        a *= value
        dgate *= value
    store_rows(dh_ptr, dgate * scale, first, width, m, n, inside, MATH)
    # Without a mask, to save registers: beyond the last column H is loaded as 0, and every f(0) is 0.
    dots = tl.sum(da * a, 1)
    store_rows(sa_ptr, a * scale, first, F, m, n, inside, MATH)
    return dots


@triton.jit
def dw_kernel(
    left_ptr, right_ptr, token_ptr, slot_ptr, weights_ptr, ends_ptr, out_ptr, bias_ptr,
    P, Q,
    left_strides, right_strides, out_strides,
    GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr, ACCUMULATE: tl.constexpr, MATH: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Writes ``out[e] = left[rows of e].T @ right[rows of e]``; zeros where e has no rows.

    One program walks all rows of its expert in order, so two runs are bit-identical. With ACCUMULATE the sum
    is added to `out` in fp32, and experts without rows stay untouched. With `bias_ptr`, the programs of the
    first columns also write ``sum_r left[r]``, each row times its combine weight if `weights_ptr` is given.
    """
    left_r, left_p = left_strides
    right_r, right_q = right_strides
    out_e, out_p, out_q = out_strides
    expert = tl.program_id(1)
    p_block, q_block = tile_and_column(tl.cdiv(P, BLOCK_P), tl.cdiv(Q, BLOCK_Q), GROUP)
    end = tl.load(ends_ptr + expert)
    begin = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    p = p_block * BLOCK_P + tl.arange(0, BLOCK_P)
    q = q_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    left_at = left_ptr + p[None, :].to(tl.int64) * left_p
    right_at = right_ptr + q[None, :].to(tl.int64) * right_q
    acc = tl.zeros((BLOCK_P, BLOCK_Q), dtype=tl.float32)
    bias = tl.zeros((BLOCK_P,), dtype=tl.float32)
    for start in range(begin, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        has_row = row < end
        wide = row.to(tl.int64)
        left_row = wide
        right_row = wide
        if GATHER_LEFT:
            left_row = tl.load(token_ptr + row, mask=has_row, other=0).to(tl.int64)
        if GATHER_RIGHT:
            right_row = tl.load(token_ptr + row, mask=has_row, other=0).to(tl.int64)
        left_mask = has_row[:, None] & (p < P)[None, :]
        left = tl.load(left_at + left_row[:, None] * left_r, mask=left_mask, other=0.0)
        right_mask = has_row[:, None] & (q < Q)[None, :]
        right = tl.load(right_at + right_row[:, None] * right_r, mask=right_mask, other=0.0)
        acc = product_step(acc, tl.trans(left), right, MATH)
        if bias_ptr is not None:
            summand = left.to(tl.float32)
            if weights_ptr is not None:
                slot = tl.load(slot_ptr + row, mask=has_row, other=0)
                scale = tl.load(weights_ptr + slot, mask=has_row, other=0.0).to(tl.float32)
                summand *= scale[:, None]
            bias += tl.sum(summand, 0)
    out_at = out_ptr + expert.to(tl.int64) * out_e
    out_at += p[:, None].to(tl.int64) * out_p + q[None, :].to(tl.int64) * out_q
    inside = (p < P)[:, None] & (q < Q)[None, :]
    if ACCUMULATE:
        inside = inside & (begin < end)
        tl.store(out_at, tl.load(out_at, mask=inside, other=0.0) + acc, mask=inside)
    else:
        tl.store(out_at, narrow(acc, out_ptr.dtype.element_ty, MATH), mask=inside)
    if bias_ptr is not None:
        at = bias_ptr + expert.to(tl.int64) * P + p
        tl.store(at, narrow(bias, bias_ptr.dtype.element_ty, MATH), mask=(p < P) & (q_block == 0))
