"""Stable counting sort of slots by expert on the device, without atomics or a copy to the host.

Three kernels: a histogram of each block of slots; a prefix sum over the blocks; and the place of each slot,
which is the start of its expert, plus the slots of that expert in earlier blocks, plus those before it in its
own block.

Letters: T tokens, K slots a token, E experts, R rows of the plan, W = E bins, or E + 1 where slots may be
unused: those come last; B blocks of slots.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Slots of a program, which compares them pairwise.
_SLOTS = 128
# Bins of one step of a program; of the prefix sum, blocks of one step, and bins of a program.
_BINS = 32
_WALKED = 128
_SCANNED = 16


@triton.jit
def bins_of(ids_ptr, mask_ptr, slot, num_slots, num_experts, MASKED: tl.constexpr):
    """Returns the bin of each slot (E where unused, E + 1 past the last slot) and whether it is used."""
    exists = slot < num_slots
    expert = tl.load(ids_ptr + slot, mask=exists, other=0)
    is_used = exists
    if MASKED:
        is_used = tl.load(mask_ptr + slot, mask=exists, other=0) != 0
        expert = tl.where(is_used, expert, num_experts)
    return tl.where(exists, expert, num_experts + 1), is_used


@triton.jit
def histogram_kernel(
    ids_ptr, mask_ptr, blocks_ptr,
    num_slots, num_experts, width,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Writes ``blocks[b, e]``: how many slots of block b are in bin e."""
    block = tl.program_id(0).to(tl.int64)
    slot = block * BLOCK_N + tl.arange(0, BLOCK_N)
    expert, is_used = bins_of(ids_ptr, mask_ptr, slot, num_slots, num_experts, MASKED)
    is_expert = (expert >= 0) & (expert < num_experts)
    tl.device_assert(is_expert | (is_used == 0), "an expert id is out of bounds")
    for first in range(0, width, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        count = tl.sum((expert[:, None] == e[None, :]).to(tl.int32), 0)
        tl.store(blocks_ptr + block * width + e, count, mask=e < width)


@triton.jit
def scan_kernel(
    blocks_ptr, totals_ptr,
    num_blocks, width,
    BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Replaces ``blocks[b, e]`` by the slots of bin e in all earlier blocks, and writes ``totals[e]``."""
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_E,), dtype=tl.int32)
    for first in range(0, num_blocks, BLOCK_B):
        block = first + tl.arange(0, BLOCK_B)
        at = blocks_ptr + block[:, None].to(tl.int64) * width + e[None, :]
        inside = (block < num_blocks)[:, None] & (e < width)[None, :]
        count = tl.load(at, mask=inside, other=0)
        tl.store(at, tl.cumsum(count, 0) - count + total[None, :], mask=inside)
        total += tl.sum(count, 0)
    tl.store(totals_ptr + e, total.to(tl.int64), mask=e < width)


@triton.jit
def place_kernel(
    ids_ptr, mask_ptr, blocks_ptr, totals_ptr, slot_ptr, token_ptr, row_ptr,
    num_slots, num_experts, width, K, num_rows,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Writes the row of each slot, and the slot and token of each row; an unused slot has the row R."""
    block = tl.program_id(0).to(tl.int64)
    slot = block * BLOCK_N + tl.arange(0, BLOCK_N)
    expert, is_used = bins_of(ids_ptr, mask_ptr, slot, num_slots, num_experts, MASKED)
    row = tl.zeros((BLOCK_N,), dtype=tl.int32)
    # Count the slots of the same expert before this one in the block.
    for first in range(0, BLOCK_N, BLOCK_E):
        other = block * BLOCK_N + first + tl.arange(0, BLOCK_E)
        its, _ = bins_of(ids_ptr, mask_ptr, other, num_slots, num_experts, MASKED)
        is_before = (expert[:, None] == its[None, :]) & (other[None, :] < slot[:, None])
        row += tl.sum(is_before.to(tl.int32), 1)
    for first in range(0, width, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        total = tl.load(totals_ptr + e, mask=e < width, other=0).to(tl.int32)
        row += tl.sum(tl.where(e[None, :] < expert[:, None], total[None, :], 0), 1)
    exists = slot < num_slots
    row += tl.load(blocks_ptr + block * width + expert, mask=exists, other=0)
    if MASKED:
        tl.device_assert(
            (row < num_rows) | (expert >= num_experts), "more slots are used than there are rows"
        )
    tl.store(slot_ptr + row, slot, mask=exists & (row < num_rows))
    tl.store(token_ptr + row, slot // K, mask=exists & (row < num_rows))
    tl.store(row_ptr + slot, tl.where(is_used, row, num_rows).to(tl.int64), mask=exists)


#: Kernels by name, in launch order.
KERNELS = MappingProxyType({"histogram": histogram_kernel, "scan": scan_kernel, "place": place_kernel})


def options(kernel: str, width: int, is_masked: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the constants and the build options of a kernel.

    Args:
        kernel: A key of `KERNELS`.
        width: W.
        is_masked: Whether slots may be unused.
    """
    bins = min(_BINS, triton.next_power_of_2(width))
    if kernel == "scan":
        return {"BLOCK_B": _WALKED, "BLOCK_E": min(_SCANNED, bins)}, {"num_warps": 4}
    # An id that no expert has traps on the device, as in torch's own index operations.
    build = {"num_warps": 4, "debug": True, "sanitize_overflow": False}
    return {"MASKED": is_masked, "BLOCK_N": _SLOTS, "BLOCK_E": bins}, build


def route(
    ids_TK: Tensor, slot_mask_TK: Tensor | None, num_experts: int, num_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sorts the slots by expert in three launches, without waiting on the CPU.

    Args:
        ids_TK: ``[T, K]`` int64, contiguous.
        slot_mask_TK: ``[T, K]`` bool, contiguous, False where a slot is unused; None where all are used.
        num_experts: E.
        num_rows: R, at least the number of used slots. Rows past those hold unused slots.

    Returns:
        ``slot_R``, ``token_R``, ``row_TK`` and ``counts_E`` of a `kernels.plan.row_plan.RowPlan`.
    """
    T, K = ids_TK.shape
    is_masked = slot_mask_TK is not None
    width = num_experts + is_masked
    slot_R, token_R = (ids_TK.new_empty(num_rows) for _ in range(2))
    row_TK = torch.empty_like(ids_TK)
    if T * K == 0:
        return slot_R, token_R, row_TK, ids_TK.new_zeros(num_experts)
    blocks = triton.cdiv(T * K, _SLOTS)
    blocks_BW = torch.empty(blocks, width, dtype=torch.int32, device=ids_TK.device)
    totals_W = ids_TK.new_empty(width)
    # Without a mask any pointer will do.
    slots = (ids_TK, slot_mask_TK if is_masked else ids_TK)
    built = {name: {**one, **two} for name in KERNELS for one, two in (options(name, width, is_masked),)}
    histogram_kernel[(blocks,)](*slots, blocks_BW, T * K, num_experts, width, **built["histogram"])
    programs = triton.cdiv(width, built["scan"]["BLOCK_E"])
    scan_kernel[(programs,)](blocks_BW, totals_W, blocks, width, **built["scan"])
    tensors = (*slots, blocks_BW, totals_W, slot_R, token_R, row_TK)
    place_kernel[(blocks,)](*tensors, T * K, num_experts, width, K, num_rows, **built["place"])
    return slot_R, token_R, row_TK, totals_W[:num_experts]
