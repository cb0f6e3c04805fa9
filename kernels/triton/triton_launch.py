"""Launches of the Triton kernels on tensors: grids, blocks and buffers, without host synchronisation.

Letters: T tokens, D model width, E experts, K slots a token, R routed rows, F expert width, U = 2F when
gated, else F; r rank; G tiles; C blocks of columns.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels.activations import ACTIVATIONS
from kernels.triton.triton_activation import CODES
from kernels.triton.triton_backward import dh_kernel, dw_kernel
from kernels.triton.triton_blocks import (
    Target,
    rank_block,
    row_blocks,
    row_height,
    rows_options,
    weight_blocks,
    weight_options,
    with_factor,
)
from kernels.triton.triton_forward import combine_kernel, rows_kernel, up_kernel
from kernels.triton.triton_lora import low_kernel
from kernels.triton.triton_tiles import tiles_kernel
from kernels.triton.tuned_blocks import tuned_blocks

# Numbers that a program of `tiles_kernel` compares: experts times tiles.
_COMPARED = 16384


def is_interpreted() -> bool:
    """Returns whether the kernels were imported under TRITON_INTERPRET=1 and run on CPU tensors."""
    return not isinstance(up_kernel, triton.JITFunction)


def target_of(x: Tensor) -> Target:
    """Returns the GPU and dtype to build kernels for."""
    if is_interpreted():
        return Target(0, x.dtype)
    major, minor = torch.cuda.get_device_capability(x.device)
    return Target(10 * major + minor, x.dtype, tuned_blocks(x.device, x.dtype))


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device current, since Triton launches on the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def arithmetic(x: Tensor) -> str:
    """Returns the constant MATH: fp32 as torch's own setting says, bf16 emulated in the interpreter."""
    if x.dtype == torch.bfloat16 and is_interpreted():
        return "emulated"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@dataclass(frozen=True)
class Tiles:
    """The tiles of a plan on the device.

    Attributes:
        tiles_G3: Expert (E where there is no tile), first row, row after the last; int32.
        ends_E: Row after the last of each expert; int32.
        height: Rows of a tile.
        target: GPU and dtype that the tiles are cut for.
    """

    tiles_G3: Tensor
    ends_E: Tensor
    height: int
    target: Target

    @property
    def bound(self) -> int:
        """G: the largest possible number of tiles."""
        return self.tiles_G3.shape[0]


def make_tiles(counts_E: Tensor, num_rows: int, target: Target) -> Tiles:
    """Cuts the rows of every expert into tiles."""
    E = counts_E.shape[0]
    height = row_height(num_rows, E, target)
    # Full tiles, and a partial one for each expert that has rows.
    bound = num_rows // height + min(E, num_rows)
    ends_E = torch.empty(E, dtype=torch.int32, device=counts_E.device)
    tiles_G3 = torch.empty(bound, 3, dtype=torch.int32, device=counts_E.device)
    block_e = triton.next_power_of_2(E)
    block_g = max(1, min(64, _COMPARED // block_e))
    blocks = {"BLOCK_M": height, "BLOCK_E": block_e, "BLOCK_G": block_g}
    grid = (max(1, triton.cdiv(bound, block_g)),)
    tiles_kernel[grid](counts_E, ends_E, tiles_G3, E, bound, **blocks, num_warps=8)
    return Tiles(tiles_G3, ends_E, height, target)


@dataclass(frozen=True)
class Gating:
    """The function between the two products.

    Attributes:
        activation: A key of `kernels.activations.ACTIVATIONS`.
        gated: Whether H holds F gate columns and then F value columns, or F columns.
    """

    activation: str
    gated: bool

    def constants(self) -> dict[str, object]:
        """Returns the constants to build a kernel with."""
        on_value = ACTIVATIONS[self.activation].on_value
        return {"ACT": CODES[self.activation], "GATED": self.gated, "ON_VALUE": on_value}


@dataclass(frozen=True)
class Side:
    """One operand of a product: rows in expert order, or tokens that the rows are gathered from."""

    rows: Tensor
    is_gathered: bool


@dataclass(frozen=True)
class LowTerm:
    """The low-rank addend of a product: ``low[r] @ factor[expert of r]``.

    Attributes:
        low_Rr: From `low_rows`.
        factor_ErN: Of any strides; N as the columns of the product.
    """

    low_Rr: Tensor
    factor_ErN: Tensor


def term_arguments(term: LowTerm | None, block_k: int) -> dict[str, object]:
    """Returns the arguments, by name, of a kernel that adds `term`."""
    if term is None:
        return {**dict.fromkeys(("low_ptr", "factor_ptr", "factor_strides")), "RANK": 0, "BLOCK_L": 16}
    low_Rr, factor_ErN = term.low_Rr, term.factor_ErN
    rank = low_Rr.shape[1]
    tensors = {"low_ptr": low_Rr, "factor_ptr": factor_ErN, "factor_strides": factor_ErN.stride()}
    return {**tensors, "RANK": rank, "BLOCK_L": rank_block(rank, block_k)}


def _strides(value: Tensor | None) -> tuple[int, ...] | None:
    return None if value is None else value.stride()


def low_rows(a: Side, b_EKr: Tensor, scale: float, token_R: Tensor, tiles: Tiles) -> Tensor:
    """Returns ``low[r] = scale * a[r] @ b[expert of r]``; b and gathered tokens may have any strides."""
    (E, K, N), R = b_EKr.shape, token_R.shape[0]
    out_RN = a.rows.new_empty(R, N)
    blocks = row_blocks("rows", tiles.height, N, K, tiles.target)
    if tiles.bound:
        pointers = (a.rows, b_EKr, token_R, tiles.tiles_G3, out_RN)
        constants = {"GATHER": a.is_gathered, "MATH": arithmetic(a.rows), **rows_options(blocks, K)}
        low_kernel[(tiles.bound * triton.cdiv(N, blocks.n),)](
            *pointers, tiles.bound, E, K, N, scale, a.rows.stride(), b_EKr.stride(), **constants
        )
    return out_RN


def up(
    x_TD: Tensor,
    w_up_EUD: Tensor,
    b_up_EU: Tensor | None,
    token_R: Tensor,
    tiles: Tiles,
    gating: Gating,
    keep: bool,
    term: LowTerm | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns H, of no rows unless `keep`, and ``A = act(H)``."""
    R, (E, U, D) = token_R.shape[0], w_up_EUD.shape
    F = U // 2 if gating.gated else U
    h_RU = x_TD.new_empty(R if keep else 0, U)
    a_RF = x_TD.new_empty(R, F)
    blocks = row_blocks("up", tiles.height, F, D, tiles.target)
    if tiles.bound:
        pointers = (x_TD, w_up_EUD, b_up_EU, token_R, tiles.tiles_G3, h_RU, a_RF)
        strides = (x_TD.stride(), w_up_EUD.stride(), _strides(b_up_EU))
        constants = {**gating.constants(), "KEEP_H": keep, "MATH": arithmetic(x_TD)}
        constants |= {**term_arguments(term, blocks.k), **rows_options(blocks, D)}
        up_kernel[(tiles.bound * triton.cdiv(F, blocks.n),)](
            *pointers, tiles.bound, E, D, F, *strides, **constants
        )
    return h_RU, a_RF


def rows_times(
    a_RK: Tensor, b_EKN: Tensor, bias_EN: Tensor | None, tiles: Tiles, term: LowTerm | None = None
) -> Tensor:
    """Returns ``out[r] = a[r] @ b[expert of r] + bias[expert of r]``; b may have any strides."""
    R, (E, K, N) = a_RK.shape[0], b_EKN.shape
    out_RN = a_RK.new_empty(R, N)
    pitch = 0 if term is None else term.factor_ErN.stride(2)
    blocks = with_factor(row_blocks("rows", tiles.height, N, K, tiles.target), pitch)
    if tiles.bound:
        pointers = (a_RK, b_EKN, bias_EN, tiles.tiles_G3, out_RN)
        constants = {"MATH": arithmetic(a_RK), **term_arguments(term, blocks.k), **rows_options(blocks, K)}
        rows_kernel[(tiles.bound * triton.cdiv(N, blocks.n),)](
            *pointers, tiles.bound, E, K, N, b_EKN.stride(), _strides(bias_EN), **constants
        )
    return out_RN


def combine(rows_RD: Tensor, weights_TK: Tensor | None, row_TK: Tensor) -> Tensor:
    """Sums the rows of each token in the order of its slots, weighted or not."""
    (R, D), (T, K) = rows_RD.shape, row_TK.shape
    out_TD = rows_RD.new_empty(T, D)
    block_d = min(512, max(16, triton.next_power_of_2(D)))
    block_t = max(1, 2048 // block_d)
    if T:
        constants = {"MATH": arithmetic(rows_RD), "BLOCK_T": block_t, "BLOCK_D": block_d}
        combine_kernel[(triton.cdiv(T, block_t), triton.cdiv(D, block_d))](
            rows_RD, weights_TK, row_TK, out_TD, T, K, D, R, **constants, num_warps=4
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
    gating: Gating,
    term: LowTerm | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dH, ``s A``, and the gradient of each row's combine weight in fp32."""
    R, (E, D, F) = token_R.shape[0], w_down_EDF.shape
    blocks = row_blocks("dh", tiles.height, F, D, tiles.target)
    columns = triton.cdiv(F, blocks.n)
    dh_RU = torch.empty_like(h_RU)
    sa_RF = h_RU.new_empty(R, F)
    dots_CR = torch.empty(columns, R, dtype=torch.float32, device=h_RU.device)
    if tiles.bound:
        inputs = (grad_TD, w_down_EDF, b_down_ED, token_R, slot_R, weights_TK, tiles.tiles_G3, h_RU)
        strides = (grad_TD.stride(), w_down_EDF.stride(), _strides(b_down_ED))
        constants = {**gating.constants(), "MATH": arithmetic(grad_TD)}
        constants |= {**term_arguments(term, blocks.k), **rows_options(blocks, D)}
        dh_kernel[(tiles.bound * columns,)](
            *inputs, dh_RU, sa_RF, dots_CR, tiles.bound, E, R, D, F, *strides, **constants
        )
    return dh_RU, sa_RF, dots_CR.sum(0)


@dataclass(frozen=True)
class BiasSums:
    """The gradient of a bias, which the kernel of its weight's gradient writes as well.

    Attributes:
        out_EP: The gradient.
        scale: ``(weights_TK, slot_R)``, to multiply each row by its combine weight; None: rows as they are.
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
    """Writes ``out[e] = left[rows of e].T @ right[rows of e]``, for a weight or a low-rank factor.

    Args:
        left: ``[R or T, P]``.
        right: ``[R or T, Q]``.
        token_R: The token of each row.
        tiles: Tiles of the plan, for the ends of the experts.
        out_EPQ: Output of any strides. P should be the wider axis: the matrix unit wants many rows.
        accumulate: Whether the product is added to `out`, which is then fp32.
        sums: Where to write the sums of left's rows, if they are needed.
    """
    E, P, Q = out_EPQ.shape
    blocks = weight_blocks(P, Q, tiles.target)
    weights_TK, slot_R = (None, None) if sums is None or sums.scale is None else sums.scale
    pointers = (left.rows, right.rows, token_R, slot_R, weights_TK, tiles.ends_E, out_EPQ)
    strides = (left.rows.stride(), right.rows.stride(), out_EPQ.stride())
    gathers = {"GATHER_LEFT": left.is_gathered, "GATHER_RIGHT": right.is_gathered}
    dw_kernel[(triton.cdiv(P, blocks.m) * triton.cdiv(Q, blocks.n), E)](
        *(*pointers, None if sums is None else sums.out_EP, P, Q, *strides),
        **gathers,
        ACCUMULATE=accumulate,
        MATH=arithmetic(left.rows),
        **weight_options(blocks),
    )
