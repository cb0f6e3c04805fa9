"""Block sizes of the Triton kernels: a small table by kind of kernel and of GPU.

`kernels.aot` checks the table: no spilled registers, shared memory within the limit. It has not been timed on
a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch


@dataclass(frozen=True)
class Blocks:
    """Shape of a program.

    Attributes:
        m: Rows of the output; first axis of a weight's gradient.
        n: Columns of the output.
        k: Length of a step of the sum.
        warps: Number of warps of 32 threads.
        stages: Steps of the sum loaded ahead.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int


#: Kinds of kernel; see `kernels.triton.triton_forward` and `kernels.triton.triton_backward`.
KINDS = ("up", "rows", "dh", "dw")
# Bytes of shared memory that a candidate may take.
_SHARED_LARGE = 200 * 1024
_SHARED_SMALL = 88 * 1024
#: Programs that share rows and weights in cache; see `kernels.triton.triton_tiles.tile_and_column`.
GROUP = 8

# Compute capability 9 to 11: 227 KiB of shared memory, and a matrix unit that reads it.
_LARGE = {
    ("up", 128): Blocks(128, 64, 64, 8, 4),
    ("rows", 128): Blocks(128, 256, 64, 8, 3),
    ("dh", 128): Blocks(128, 64, 64, 8, 4),
    ("dw", 0): Blocks(128, 128, 64, 8, 3),
    ("up", 64): Blocks(64, 64, 64, 4, 4),
    ("rows", 64): Blocks(64, 128, 64, 4, 4),
    ("dh", 64): Blocks(64, 64, 64, 4, 4),
}
# Capability 8 and 12: at least 99 KiB.
_SMALL = {
    ("up", 128): Blocks(128, 64, 32, 8, 3),
    ("rows", 128): Blocks(128, 128, 32, 8, 3),
    ("dh", 128): Blocks(128, 32, 32, 8, 3),
    ("dw", 0): Blocks(128, 128, 32, 8, 3),
    ("up", 64): Blocks(64, 64, 32, 4, 3),
    ("rows", 64): Blocks(64, 128, 32, 4, 3),
    ("dh", 64): Blocks(64, 32, 32, 4, 3),
}
# Few rows: time goes into loading weights, so loads ahead matter and the tile does not.
_FEW = {
    **{(kind, 32): Blocks(32, 64, 64, 4, 3) for kind in KINDS[:3]},
    ("up", 32): Blocks(32, 64, 32, 4, 4),
    **{(kind, 16): Blocks(16, 64, 64, 4, 3) for kind in KINDS[:3]},
}
# True fp32 has no matrix unit, and its registers hold less.
_FP32 = {
    ("dw", 0): Blocks(64, 64, 16, 8, 2),
    **{(kind, 64): Blocks(64, 64, 16, 8, 2) for kind in KINDS[:3]},
    **{(kind, 32): Blocks(32, 64, 16, 4, 2) for kind in KINDS[:3]},
    **{(kind, 16): Blocks(16, 64, 16, 4, 2) for kind in KINDS[:3]},
}
# The interpreter runs one program after the other, at a millisecond a step whatever its size.
_INTERPRETED = {
    **{(kind, m): Blocks(m, 64, 32, 4, 1) for kind in KINDS[:3] for m in (128, 64, 32, 16)},
    ("dw", 0): Blocks(64, 64, 32, 4, 1),
}


@dataclass(frozen=True)
class Target:
    """GPU and dtype that kernels are built for.

    Attributes:
        capability: ``major * 10 + minor`` of the GPU, 0 for the interpreter.
        dtype: Dtype of the experts.
        tuned: Measured blocks by `bucket`; they take precedence over the table.
    """

    capability: int
    dtype: torch.dtype
    tuned: Mapping[str, Blocks] = field(default_factory=dict, hash=False)

    def table(self) -> Mapping[tuple[str, int], Blocks]:
        """Returns the blocks by kind and row height."""
        if self.capability == 0:
            return MappingProxyType(_INTERPRETED)
        if self.dtype == torch.float32:
            return MappingProxyType(_FP32)
        large = 90 <= self.capability < 120
        return MappingProxyType({**(_LARGE if large else _SMALL), **_FEW})


def row_height(num_rows: int, num_experts: int, target: Target) -> int:
    """Returns the rows of a tile; fewer with few rows, as half a tile an expert is wasted on average."""
    mean = num_rows / max(num_experts, 1)
    heights = sorted((height for kind, height in target.table() if kind == "up"), reverse=True)
    return next((height for height in heights if mean >= 1.5 * height), heights[-1])


def row_blocks(kind: str, height: int, columns: int, depth: int, target: Target) -> Blocks:
    """Returns the blocks of a kernel whose output has rows, no wider than the matrices.

    Args:
        kind: A member of `KINDS` other than ``dw``.
        height: From `row_height`.
        columns: Width of the output.
        depth: Length of the sum.
        target: GPU and dtype.
    """
    found = target.tuned.get(bucket(kind, height, columns, depth)) or target.table()[kind, height]
    return replace(found, n=min(found.n, _power_of_two(columns)), k=min(found.k, _power_of_two(depth)))


def weight_blocks(out: int, inner: int, target: Target) -> Blocks:
    """Returns the blocks of the gradient of a weight ``[out, inner]``, no wider than it."""
    found = target.tuned.get(bucket("dw", 0, inner, out)) or target.table()["dw", 0]
    return replace(found, m=min(found.m, _power_of_two(out)), n=min(found.n, _power_of_two(inner)))


def with_factor(blocks: Blocks, pitch: int) -> Blocks:
    """Narrows the blocks where a strided low-rank factor would fill the registers with its addresses.

    Args:
        blocks: Blocks of rows times weight.
        pitch: Elements between columns of the factor; 0 without a factor.
    """
    is_fp32 = blocks.k <= 16
    if pitch <= 1 or (pitch % 16 == 0 and not is_fp32):
        return blocks
    return replace(blocks, n=min(blocks.n, 32 if is_fp32 else 128))


def rank_block(rank: int, block_k: int) -> int:
    """Returns the step of the sum over a low rank, no longer than that of the sum whose memory it shares."""
    return min(block_k, _power_of_two(rank))


def bucket(kind: str, height: int, columns: int, depth: int) -> str:
    """Returns the key of tuned blocks; shapes with the same powers of two share it.

    Args:
        kind: A member of `KINDS`.
        height: Rows of a tile, 0 for ``dw``.
        columns: Width of the output.
        depth: Length of the sum; height of the output for ``dw``.
    """
    return f"{kind} {height} {_power_of_two(columns)} {_power_of_two(depth)}"


def candidates(kind: str, height: int, target: Target) -> tuple[Blocks, ...]:
    """Returns the table's blocks, and their neighbours that fit into registers and shared memory.

    `kernels.aot` compiles them all for 16-bit dtypes; other dtypes have only the table's.

    Args:
        kind: A member of `KINDS`.
        height: Rows of a tile, 0 for ``dw``.
        target: GPU and dtype.
    """
    base = target.table()[kind, height]
    if target.dtype.itemsize != 2:
        return (base,)
    # On older GPUs the sums over a short tile of `dh` leave no registers for more loads ahead.
    more = () if kind == "dh" and height == 32 else (base.stages + 1,)
    near = [
        *(replace(base, n=n) for n in (base.n // 2, base.n * 2)),
        *(replace(base, k=k) for k in (base.k // 2, base.k * 2)),
        *(replace(base, stages=stages) for stages in (base.stages - 1, *more)),
        replace(base, warps=4 if base.warps == 8 else 8),
    ]
    return (base, *(blocks for blocks in near if _fits(kind, blocks, target)))


def _fits(kind: str, blocks: Blocks, target: Target) -> bool:
    # `up` runs two products side by side, and `dh` has the longest epilogue.
    wide, most = {"up": (2, 64), "dh": (1, 32)}.get(kind, (1, 128))
    loaded = blocks.k * (blocks.m + wide * blocks.n) * target.dtype.itemsize
    limit = _SHARED_LARGE if 90 <= target.capability < 120 else _SHARED_SMALL
    sums = blocks.m * blocks.n * wide // (32 * blocks.warps)
    is_usual = 16 <= blocks.n <= 256 and 16 <= blocks.k <= 128 and 2 <= blocks.stages <= 5
    return is_usual and blocks.stages * loaded <= limit and sums <= most


def rows_options(blocks: Blocks, depth: int) -> dict[str, int | bool]:
    """Returns the block and build options of a kernel with rows."""
    sizes = {"BLOCK_M": blocks.m, "BLOCK_N": blocks.n, "BLOCK_K": blocks.k, "GROUP": GROUP}
    return {"EVEN_K": depth % blocks.k == 0, **sizes, **_build(blocks)}


def weight_options(blocks: Blocks) -> dict[str, int | bool]:
    """Returns the block and build options of the kernel of a weight's gradient."""
    sizes = {"BLOCK_P": blocks.m, "BLOCK_Q": blocks.n, "BLOCK_R": blocks.k, "GROUP": GROUP}
    return {**sizes, **_build(blocks)}


def _build(blocks: Blocks) -> dict[str, int]:
    return {"num_warps": blocks.warps, "num_stages": blocks.stages}


def _power_of_two(width: int) -> int:
    # Matrix units take at least 16.
    return max(16, 1 << (width - 1).bit_length())
