"""Launches the Triton kernels on tensors: grids, blocks, buffers. No host synchronisation.

What backward alone needs is in `kernels.triton.triton_launch_backward`.

Letters: T tokens, D model width, E experts, K slots a token, R routed rows, F expert width, U = 2F when
gated, else F; r rank; G tiles.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels.activations import ACTIVATIONS
from kernels.triton.triton_activation import CODES
from kernels.triton.triton_blocks import Target, rank_block, row_blocks, row_height, rows_options, with_factor
from kernels.triton.triton_forward import combine_kernel, rows_kernel, up_kernel
from kernels.triton.triton_lora import low_kernel
from kernels.triton.triton_tiles import tiles_kernel
from kernels.triton.tuned_blocks import tuned_blocks

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
    return Target(10 * major + minor, x.dtype, tuned_blocks(x.device, x.dtype))


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def arithmetic(x: Tensor) -> dict[str, object]:
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


@dataclass(frozen=True)
class Gating:
    """What happens between the two products.

    Attributes:
        activation: A key of `kernels.activations.ACTIVATIONS`.
        gated: Whether H holds F gate columns and then F value columns, or F columns.
    """

    activation: str
    gated: bool

    def constants(self) -> dict[str, object]:
        """What a kernel is built with."""
        on_value = ACTIVATIONS[self.activation].on_value
        return {"ACT": CODES[self.activation], "GATED": self.gated, "ON_VALUE": on_value}


@dataclass(frozen=True)
class Side:
    """One operand of a product: rows in expert order, or tokens that the rows are gathered from."""

    rows: Tensor
    is_gathered: bool


@dataclass(frozen=True)
class LowTerm:
    """What low-rank factors add to a product: ``low[r] @ factor[expert of r]``.

    Attributes:
        low_Rr: From `low_rows`.
        factor_ErN: Of any strides; N as the columns of what it is added to.
    """

    low_Rr: Tensor
    factor_ErN: Tensor


def term_arguments(term: LowTerm | None, block_k: int) -> dict[str, object]:
    """What a kernel that adds `term` is called with, by name."""
    if term is None:
        names = ("low_ptr", "factor_ptr", "factor_e", "factor_r", "factor_n")
        return {**dict.fromkeys(names[:2]), **dict.fromkeys(names[2:], 0), "RANK": 0, "BLOCK_L": 16}
    rank = term.low_Rr.shape[1]
    factor_e, factor_r, factor_n = term.factor_ErN.stride()
    return {
        "low_ptr": term.low_Rr,
        "factor_ptr": term.factor_ErN,
        "factor_e": factor_e,
        "factor_r": factor_r,
        "factor_n": factor_n,
        "RANK": rank,
        "BLOCK_L": rank_block(rank, block_k),
    }


def low_rows(a: Side, b_EKr: Tensor, scale: float, token_R: Tensor, tiles: Tiles) -> Tensor:
    """``low[r] = scale * a[r] @ b[expert of r]``, few columns; any strides of b and of gathered tokens."""
    (E, K, N), R = b_EKr.shape, token_R.shape[0]
    out_RN = a.rows.new_empty(R, N)
    blocks = row_blocks("rows", tiles.height, N, K, tiles.target)
    if tiles.bound:
        low_kernel[(tiles.bound * triton.cdiv(N, blocks.n),)](
            a.rows,
            b_EKr,
            token_R,
            tiles.tiles_G3,
            out_RN,
            tiles.bound,
            E,
            K,
            N,
            scale,
            *a.rows.stride(),
            *b_EKr.stride(),
            GATHER=a.is_gathered,
            **arithmetic(a.rows),
            **rows_options(blocks, K),
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
    """H, of no rows unless it is to be kept, and ``A = act(H)``."""
    R, (E, U, D) = token_R.shape[0], w_up_EUD.shape
    F = U // 2 if gating.gated else U
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
            **gating.constants(),
            BIAS=b_up_EU is not None,
            KEEP_H=keep,
            **term_arguments(term, blocks.k),
            **arithmetic(x_TD),
            **rows_options(blocks, D),
        )
    return h_RU, a_RF


def rows_times(
    a_RK: Tensor, b_EKN: Tensor, bias_EN: Tensor | None, tiles: Tiles, term: LowTerm | None = None
) -> Tensor:
    """``out[r] = a[r] @ b[expert of r] + bias[expert of r]``; any strides of b."""
    R, (E, K, N) = a_RK.shape[0], b_EKN.shape
    out_RN = a_RK.new_empty(R, N)
    pitch = 0 if term is None else term.factor_ErN.stride(2)
    blocks = with_factor(row_blocks("rows", tiles.height, N, K, tiles.target), pitch)
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
            **term_arguments(term, blocks.k),
            **arithmetic(a_RK),
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
