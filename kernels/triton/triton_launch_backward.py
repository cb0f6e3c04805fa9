"""Launches the Triton kernels that backward alone needs: dH, and the gradients of weights and factors.

Letters: T tokens, D model width, E experts, K slots a token, R routed rows, F expert width, U = 2F when
gated, else F; r rank; C blocks of columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels.triton.triton_backward import dh_kernel, dw_kernel
from kernels.triton.triton_blocks import row_blocks, rows_options, weight_blocks, weight_options
from kernels.triton.triton_launch import Gating, LowTerm, Side, Tiles, arithmetic, term_arguments


def down_backward(
    grad_TD: Tensor,
    w_down_EDF: Tensor,
    b_down_ED: Tensor | None,
    weights_TK: Tensor,
    token_R: Tensor,
    slot_R: Tensor,
    tiles: Tiles,
    h_RU: Tensor,
    gating: Gating,
    term: LowTerm | None = None,
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
            **gating.constants(),
            BIAS=b_down_ED is not None,
            **term_arguments(term, blocks.k),
            **arithmetic(grad_TD),
            **rows_options(blocks, D),
        )
    return dh_RU, sa_RF, dots_CR.sum(0)


@dataclass(frozen=True)
class BiasSums:
    """The gradient of a bias, which the kernel of its weight's gradient writes besides.

    Attributes:
        out_EP: Where it goes.
        scale: ``(weights_TK, slot_R)``: each row times its combine weight. None: the rows as they are.
    """

    out_EP: Tensor
    scale: tuple[Tensor, Tensor] | None = None


def weight_gradient(
    left: Side,
    right: Side,
    token_R: Tensor,
    tiles: Tiles,
    out_EPQ: Tensor,
    accumulate: bool = False,
    sums: BiasSums | None = None,
) -> None:
    """``out[e] = left[rows of e].T @ right[rows of e]``, of a weight or of a low-rank factor.

    Args:
        left: ``[R or T, P]``.
        right: ``[R or T, Q]``.
        token_R: The token of each row.
        tiles: For the ends of the experts.
        out_EPQ: Of any strides. The wider of the two axes should be P: the matrix unit wants many rows.
        accumulate: Whether the product is added to what stands in `out`, which is then fp32.
        sums: The sums of left's rows, if they are wanted.
    """
    E, P, Q = out_EPQ.shape
    blocks = weight_blocks(P, Q, tiles.target)
    scale = None if sums is None else sums.scale
    weights_TK, slot_R = (None, None) if scale is None else scale
    dw_kernel[(triton.cdiv(P, blocks.m) * triton.cdiv(Q, blocks.n), E)](
        left.rows,
        right.rows,
        token_R,
        slot_R,
        weights_TK,
        tiles.ends_E,
        out_EPQ,
        None if sums is None else sums.out_EP,
        P,
        Q,
        *left.rows.stride(),
        *right.rows.stride(),
        *out_EPQ.stride(),
        GATHER_LEFT=left.is_gathered,
        GATHER_RIGHT=right.is_gathered,
        BIAS=sums is not None,
        SCALE_BIAS=scale is not None,
        ACCUMULATE=accumulate,
        **arithmetic(left.rows),
        **weight_options(blocks),
    )
