"""Launches the Triton kernels on tensors: grids, blocks, buffers. No host synchronisation.

Letters: T tokens, D model width, E experts, K slots a token, R routed rows, F expert width, U = 2F when
gated, else F; G tiles, C blocks of columns.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels.triton_activation import CODES
from kernels.triton_backward import dh_kernel, dw_kernel
from kernels.triton_blocks import (
    Target,
    row_blocks,
    row_height,
    rows_options,
    weight_blocks,
    weight_options,
)
from kernels.triton_forward import combine_kernel, rows_kernel, up_kernel
from kernels.triton_tiles import tiles_kernel

# Numbers that a program of `tiles_kernel` compares: experts times tiles.
_COMPARED = 16384


def is_interpreted() -> bool:
    """Whether the kernels were imported under TRITON_INTERPRET=1 and run on CPU tensors."""
    return not isinstance(up_kernel, triton.JITFunction)


def target_of(x: Tensor) -> Target:
    """What kernels on this tensor are built for."""
    if is_interpreted():
        return Target(0, x.dtype)
    major, minor = torch.cuda.get_device_capability(x.device)
    return Target(10 * major + minor, x.dtype)


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _arithmetic(x: Tensor) -> dict[str, object]:
    """How products are taken: fp32 as torch's own setting says, bf16 raised for the interpreter."""
    exact = torch.get_float32_matmul_precision() == "highest"
    return {"PRECISION": "ieee" if exact else "tf32", "RAISE": _is_raised(x)}


def _is_raised(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and is_interpreted()


@dataclass(frozen=True)
class Tiles:
    """The tiles of a plan on the device.

    Attributes:
        tiles_G3: Expert (E where there is no tile), first row, row after the last; int32.
        ends_E: Row after the last of each expert; int32.
        height: Rows of a tile.
        target: What the tiles are for.
    """

    tiles_G3: Tensor
    ends_E: Tensor
    height: int
    target: Target

    @property
    def bound(self) -> int:
        """G: as many tiles as there can be."""
        return self.tiles_G3.shape[0]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.ends_E.shape[0]


def make_tiles(counts_E: Tensor, num_rows: int, target: Target) -> Tiles:
    """Cuts the rows of every expert into tiles."""
    E = counts_E.shape[0]
    height = row_height(num_rows, E, target)
    # Full tiles, and one that is not for each expert that has rows.
    bound = num_rows // height + min(E, num_rows)
    ends_E = torch.empty(E, dtype=torch.int32, device=counts_E.device)
    tiles_G3 = torch.empty(bound, 3, dtype=torch.int32, device=counts_E.device)
    block_e = triton.next_power_of_2(E)
    block_g = max(1, min(64, _COMPARED // block_e))
    tiles_kernel[(max(1, triton.cdiv(bound, block_g)),)](
        counts_E,
        ends_E,
        tiles_G3,
        E,
        bound,
        BLOCK_M=height,
        BLOCK_E=block_e,
        BLOCK_G=block_g,
        num_warps=8,
    )
    return Tiles(tiles_G3, ends_E, height, target)


def up(
    x_TD: Tensor,
    w_up_EUD: Tensor,
    b_up_EU: Tensor | None,
    token_R: Tensor,
    tiles: Tiles,
    activation: str,
    gated: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """H, of no rows unless it is to be kept, and ``A = act(H)``."""
    R, (E, U, D) = token_R.shape[0], w_up_EUD.shape
    F = U // 2 if gated else U
    h_RU = x_TD.new_empty(R if keep else 0, U)
    a_RF = x_TD.new_empty(R, F)
    blocks = row_blocks("up", tiles.height, F, D, tiles.target)
    if tiles.bound:
        up_kernel[(tiles.bound * triton.cdiv(F, blocks.n),)](
            x_TD,
            w_up_EUD,
            x_TD if b_up_EU is None else b_up_EU,
            token_R,
            tiles.tiles_G3,
            h_RU,
            a_RF,
            tiles.bound,
            E,
            D,
            F,
            *x_TD.stride(),
            *w_up_EUD.stride(),
            *((0, 0) if b_up_EU is None else b_up_EU.stride()),
            ACT=CODES[activation],
            GATED=gated,
            BIAS=b_up_EU is not None,
            KEEP_H=keep,
            **_arithmetic(x_TD),
            **rows_options(blocks, D),
        )
    return h_RU, a_RF


def rows_times(a_RK: Tensor, b_EKN: Tensor, bias_EN: Tensor | None, tiles: Tiles) -> Tensor:
    """``out[r] = a[r] @ b[expert of r] + bias[expert of r]``; any strides of b."""
    R, (E, K, N) = a_RK.shape[0], b_EKN.shape
    out_RN = a_RK.new_empty(R, N)
    blocks = row_blocks("rows", tiles.height, N, K, tiles.target)
    if tiles.bound:
        rows_kernel[(tiles.bound * triton.cdiv(N, blocks.n),)](
            a_RK,
            b_EKN,
            a_RK if bias_EN is None else bias_EN,
            tiles.tiles_G3,
            out_RN,
            tiles.bound,
            E,
            K,
            N,
            *b_EKN.stride(),
            *((0, 0) if bias_EN is None else bias_EN.stride()),
            BIAS=bias_EN is not None,
            **_arithmetic(a_RK),
            **rows_options(blocks, K),
        )
    return out_RN


def combine(rows_RD: Tensor, weights_TK: Tensor | None, row_TK: Tensor) -> Tensor:
    """Sums the rows of each token in the order of its slots, weighted or not."""
    (R, D), (T, K) = rows_RD.shape, row_TK.shape
    out_TD = rows_RD.new_empty(T, D)
    block_d = min(512, max(16, triton.next_power_of_2(D)))
    block_t = max(1, 2048 // block_d)
    if T:
        combine_kernel[(triton.cdiv(T, block_t), triton.cdiv(D, block_d))](
            rows_RD,
            rows_RD if weights_TK is None else weights_TK,
            row_TK,
            out_TD,
            T,
            K,
            D,
            R,
            WEIGHTED=weights_TK is not None,
            RAISE=_is_raised(rows_RD),
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            num_warps=4,
        )
    return out_TD


def down_backward(
    grad_TD: Tensor,
    w_down_EDF: Tensor,
    b_down_ED: Tensor | None,
    weights_TK: Tensor,
    token_R: Tensor,
    slot_R: Tensor,
    tiles: Tiles,
    h_RU: Tensor,
    activation: str,
    gated: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dH, ``s A``, and the gradient of each row's combine weight in fp32."""
    R, (E, D, F) = token_R.shape[0], w_down_EDF.shape
    blocks = row_blocks("dh", tiles.height, F, D, tiles.target)
    columns = triton.cdiv(F, blocks.n)
    dh_RU = torch.empty_like(h_RU)
    sa_RF = h_RU.new_empty(R, F)
    dots_CR = torch.empty(columns, R, dtype=torch.float32, device=h_RU.device)
    if tiles.bound:
        dh_kernel[(tiles.bound * columns,)](
            grad_TD,
            w_down_EDF,
            grad_TD if b_down_ED is None else b_down_ED,
            token_R,
            slot_R,
            weights_TK,
            tiles.tiles_G3,
            h_RU,
            dh_RU,
            sa_RF,
            dots_CR,
            tiles.bound,
            E,
            R,
            D,
            F,
            *grad_TD.stride(),
            *w_down_EDF.stride(),
            *((0, 0) if b_down_ED is None else b_down_ED.stride()),
            ACT=CODES[activation],
            GATED=gated,
            BIAS=b_down_ED is not None,
            **_arithmetic(grad_TD),
            **rows_options(blocks, D),
        )
    return dh_RU, sa_RF, dots_CR.sum(0)


@dataclass(frozen=True)
class Side:
    """One operand of a weight's gradient: rows in expert order, or tokens that the rows are gathered from."""

    rows: Tensor
    is_gathered: bool


def weight_gradient(
    left: Side,
    right: Side,
    token_R: Tensor,
    tiles: Tiles,
    like: Tensor,
    bias_scale: tuple[Tensor, Tensor] | None = None,
    with_bias: bool = False,
) -> tuple[Tensor, Tensor]:
    """``out[e] = left[rows of e].T @ right[rows of e]``, and the sums of left's rows.

    Args:
        left: ``[R or T, P]``.
        right: ``[R or T, Q]``.
        token_R: The token of each row.
        tiles: For the ends of the experts.
        like: Gives dtype and device of the gradients.
        bias_scale: ``(weights_TK, slot_R)``: each row of the sums times its combine weight.
        with_bias: Whether the sums are wanted; else they are empty.
    """
    E, P, Q = tiles.num_experts, left.rows.shape[1], right.rows.shape[1]
    out_EPQ = like.new_empty(E, P, Q)
    bias_EP = like.new_empty(E if with_bias else 0, P)
    blocks = weight_blocks(P, Q, tiles.target)
    weights, slot_R = (left.rows, token_R) if bias_scale is None else bias_scale
    dw_kernel[(triton.cdiv(P, blocks.m) * triton.cdiv(Q, blocks.n), E)](
        left.rows,
        right.rows,
        token_R,
        slot_R,
        weights,
        tiles.ends_E,
        out_EPQ,
        bias_EP,
        P,
        Q,
        *left.rows.stride(),
        *right.rows.stride(),
        GATHER_LEFT=left.is_gathered,
        GATHER_RIGHT=right.is_gathered,
        BIAS=with_bias,
        SCALE_BIAS=bias_scale is not None,
        **_arithmetic(left.rows),
        **weight_options(blocks),
    )
    return out_EPQ, bias_EP
