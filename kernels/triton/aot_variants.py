"""Launches of the Triton kernels, described so that `kernels.aot` can compile them without a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from kernels.triton.triton_blocks import (
    Blocks,
    Target,
    bucket,
    candidates,
    rank_block,
    row_blocks,
    rows_options,
    weight_blocks,
    weight_options,
    with_factor,
)

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: Kernels without a matrix product.
PRODUCTLESS = ("combine", "tiles", "histogram", "scan", "place")
# A layer's widths, far above every block.
_WIDTH = 2048


def _strides(**axes: str) -> dict[str, tuple[str | int, ...]]:
    """Returns the stride arguments of tensors, from a letter for each axis, or 1 where the stride is one."""
    return {
        f"{tensor}_strides": tuple(1 if axis == "1" else f"{tensor}_{axis}" for axis in letters)
        for tensor, letters in axes.items()
    }


# Kernels with rows -> strides of contiguous weights and factors.
_ROWS = {
    "up": _strides(x="t1", w="eu1", bias="e1", factor="e1n"),
    "down": _strides(b="e1n", bias="e1", factor="e1n"),
    "dx": _strides(b="ek1", bias="e1", factor="er1"),
    "dh": _strides(grad="t1", w="ed1", bias="e1", factor="er1"),
}
# Kernels whose blocks are tuned -> kind of blocks.
_KINDS = {"up": "up", "down": "rows", "dh": "dh", "dw_up": "dw"}
# The first product of low-rank factors: with x, with A, and of the gradients of both.
_LOW = {
    "low_up": {"GATHER": True, **_strides(a="r1", b="e1n")},
    "low_down": {"GATHER": False, **_strides(a="r1", b="e1n")},
    "low_dy": {"GATHER": True, **_strides(a="r1", b="ek1")},
    "low_dh": {"GATHER": False, **_strides(a="r1", b="ek1")},
}


def _gathers(left: bool, right: bool, out: str) -> dict[str, Any]:
    sides = {"GATHER_LEFT": left, "GATHER_RIGHT": right}
    return {**sides, **_strides(left="r1", right="r1", out=out)}


# Gradients of weights.
_WEIGHTS = {"dw_up": _gathers(False, True, "ep1"), "dw_down": _gathers(True, False, "ep1")}
# Gradients of factors A, written transposed, and of factors B.
_FACTORS = {
    "da_up": _gathers(True, False, "e1q"),
    "db_up": _gathers(False, False, "ep1"),
    "da_down": _gathers(False, False, "e1q"),
    "db_down": _gathers(True, False, "ep1"),
}


@dataclass(frozen=True)
class Variant:
    """One way in which a kernel is launched.

    Attributes:
        kernel: ``up``, ``down`` (rows times weight), ``dx`` (the same along other strides), ``dh``,
            ``dw_up``, ``dw_down``, ``combine``, ``tiles``, ``histogram``, ``scan`` or ``place``; of low-rank
            factors: ``low_up``, ``low_down``, ``low_dy``, ``low_dh``, ``da_up``, ``db_up``, ``da_down`` or
            ``db_down``.
        dtype: ``bf16``, ``fp16`` or ``fp32``.
        height: Rows of a tile; ignored by kernels without tiles.
        gated: Whether the expert is gated.
        bias: Whether it has biases.
        activation: A name inside the kernels.
        ones: Whether every size is 1: Triton makes such arguments constants, which are no tensors.
        rank: Rank of low-rank factors; 0 without factors.
        accumulates: Whether a weight's gradient is added to an fp32 buffer.
        blocks: Blocks in place of the table's.
    """

    kernel: str
    dtype: str = "bf16"
    height: int = 128
    gated: bool = True
    bias: bool = False
    activation: str = "silu"
    ones: bool = False
    rank: int = 0
    accumulates: bool = False
    blocks: Blocks | None = None


#: One of each kernel as it runs in pre-training.
REPRESENTATIVE = tuple(
    Variant(kernel) for kernel in ("up", "down", "dx", "dh", "dw_up", "dw_down", *PRODUCTLESS)
)

#: Each kernel that low-rank factors, fp32 accumulation or dReLU change, as it runs in fine-tuning.
ADDED = (
    *(Variant(kernel, rank=16) for kernel in (*_ROWS, *_LOW, *_FACTORS)),
    Variant("dw_up", accumulates=True),
    Variant("dh", activation="drelu"),
)


def all_variants() -> Iterator[Variant]:
    """Yields every dtype, tile height, gating, bias, the costliest activations, and low ranks."""
    yield from REPRESENTATIVE
    yield from ADDED
    yield from (Variant(kernel, rank=r) for kernel in (*_ROWS, *_LOW, *_FACTORS) for r in (4, 64, 128))
    for dtype, height in (("bf16", 64), ("bf16", 16), ("fp16", 128), ("fp32", 64)):
        yield from (Variant(kernel, dtype, height, rank=16) for kernel in (*_ROWS, *_LOW))
    for dtype in ("fp16", "fp32"):
        yield from (Variant(kernel, dtype, accumulates=True) for kernel in ("dw_up", "dw_down"))
    yield from (Variant(k, accumulates=True, bias=True) for k in ("dw_up", "dw_down"))
    yield from (Variant(kernel, activation="drelu", rank=16, bias=True) for kernel in ("up", "dh"))
    for dtype, heights in (("bf16", (128, 64, 32, 16)), ("fp16", (128,)), ("fp32", (64, 32, 16))):
        for height in heights:
            yield from (Variant(kernel, dtype, height) for kernel in ("up", "down", "dx", "dh"))
        yield from (Variant(kernel, dtype, bias=True) for kernel in ("dw_up", "dw_down"))
    for kernel in ("up", "dh"):
        yield from (Variant(kernel, activation=name, bias=True) for name in ("gelu", "gelu_tanh"))
        yield from (Variant(kernel, activation=name, gated=False) for name in ("relu", "relu2"))


def launch_constants(variant: Variant, capability: int) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Returns the kernel of a variant, its constants and its build options on a GPU.

    Among the constants, strides are tuples that hold a name where a stride may take any value.
    """
    from kernels.plan import triton_route
    from kernels.triton import triton_backward, triton_forward, triton_lora, triton_tiles

    target = _target(variant, capability)
    arithmetic: dict[str, Any] = {"MATH": "ieee"}
    if variant.kernel == "tiles":
        blocks = {"BLOCK_M": 128, "BLOCK_E": 128, "BLOCK_G": 64}
        return triton_tiles.tiles_kernel, blocks, {"num_warps": 8}
    if variant.kernel in triton_route.KERNELS:
        return triton_route.KERNELS[variant.kernel], *triton_route.options(variant.kernel, 128, True)
    if variant.kernel == "combine":
        blocks = {**arithmetic, "BLOCK_T": 4, "BLOCK_D": 512}
        return triton_forward.combine_kernel, blocks, {"num_warps": 4}
    if variant.kernel in {**_WEIGHTS, **_FACTORS}:
        options = weight_options(weight_blocks(_WIDTH, variant.rank or _WIDTH, target))
        return _split(triton_backward.dw_kernel, {**_product(variant), **arithmetic}, options)
    if variant.kernel in _LOW:
        options = rows_options(row_blocks("rows", variant.height, variant.rank, _WIDTH, target), _WIDTH)
        return _split(triton_lora.low_kernel, {**_LOW[variant.kernel], **arithmetic}, options)
    kind = "rows" if variant.kernel in ("down", "dx") else variant.kernel
    found = row_blocks(kind, variant.height, _WIDTH, _WIDTH, target)
    if kind == "rows":
        is_across = _ROWS[variant.kernel]["factor_strides"][-1] != 1
        found = with_factor(found, variant.rank if is_across else 1)
    own = {**_ROWS[variant.kernel], **_term(variant, found.k), **arithmetic}
    if not variant.bias:
        own |= {"bias_ptr": None, "bias_strides": None}
    if kind != "rows":
        activation = "relu" if variant.activation == "drelu" else variant.activation
        own |= {"ACT": activation, "GATED": variant.gated, "ON_VALUE": variant.activation == "drelu"}
    if kind == "up":
        own["KEEP_H"] = True
    kernels = {
        "up": triton_forward.up_kernel,
        "rows": triton_forward.rows_kernel,
        "dh": triton_backward.dh_kernel,
    }
    return _split(kernels[kind], own, rows_options(found, _WIDTH))


def candidate_variants(capability: int) -> Iterator[Variant]:
    """Yields every candidate that `kernels.tune` may choose on a GPU besides the table's blocks."""
    target = Target(capability, torch.bfloat16)
    for kernel, kind in _KINDS.items():
        for height in (0,) if kind == "dw" else (128, 64, 32, 16):
            for blocks in candidates(kind, height, target)[1:]:
                yield Variant(kernel, height=height or 128, blocks=blocks)


def _target(variant: Variant, capability: int) -> Target:
    target = Target(capability, _DTYPES[variant.dtype])
    if variant.blocks is None:
        return target
    kind = _KINDS[variant.kernel]
    place = bucket(kind, 0 if kind == "dw" else variant.height, _WIDTH, _WIDTH)
    return replace(target, tuned={place: variant.blocks})


def _product(variant: Variant) -> dict[str, Any]:
    """Returns the constants of a weight's or factor's gradient; arguments that a launch omits are None."""
    absent = [] if variant.bias and variant.kernel == "dw_down" else ["slot_ptr", "weights_ptr"]
    absent += [] if variant.bias else ["bias_ptr"]
    own = {**_WEIGHTS, **_FACTORS}[variant.kernel]
    return {**own, "ACCUMULATE": variant.accumulates, **dict.fromkeys(absent)}


def _term(variant: Variant, block_k: int) -> dict[str, Any]:
    """Returns the constants of the low-rank term, as `triton_launch.term_arguments` has them."""
    if variant.rank:
        return {"RANK": variant.rank, "BLOCK_L": rank_block(variant.rank, block_k)}
    return {**dict.fromkeys(("low_ptr", "factor_ptr", "factor_strides")), "RANK": 0, "BLOCK_L": 16}


def _split(
    kernel: Any, constants: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    build = {name: value for name, value in options.items() if name.startswith("num_")}
    blocks = {name: value for name, value in options.items() if name not in build}
    return kernel, {**constants, **blocks}, build
