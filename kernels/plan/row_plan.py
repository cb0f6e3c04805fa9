"""Plan of the routed rows: the index, shared by all back ends, from tokens to expert order and back.

Letters: T tokens, E experts, K slots a token, R routed rows (one for each used token-expert pair), N slots.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# numpy sorts 16-bit integers by radix, 15 times faster than torch's comparison sort (T*K = 16k, E = 64).
_RADIX_SORTABLE_EXPERTS = 2**15 - 1


@dataclass(frozen=True)
class RowPlan:
    """Routed rows in expert order. Rows of one expert are contiguous and keep token order.

    Attributes:
        token_R: ``[R]`` int64, the token that each routed row is a copy of.
        slot_R: ``[R]`` int64, the flat slot ``t * K + k`` that each routed row came from.
        row_TK: ``[T, K]`` int64, the routed row of each slot; unused slots hold R.
        counts_E: ``[E]`` int64 rows of each expert, on the device of the ids.
        has_unused: Whether some slot may be unused, so that ``row_TK`` may hold R.
        is_padded: Whether padding rows may follow those of the last expert. They name unused slots, no
            expert computes them, and their contents must not reach any result.
    """

    token_R: Tensor
    slot_R: Tensor
    row_TK: Tensor
    counts_E: Tensor
    has_unused: bool
    is_padded: bool = False

    @property
    def num_rows(self) -> int:
        """R."""
        return self.token_R.shape[0]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.counts_E.shape[0]

    def is_used_R1(self) -> Tensor:
        """Returns ``[R, 1]`` bool on the device, False in padding rows."""
        row_R = torch.arange(self.num_rows, device=self.counts_E.device)
        return (row_R < self.counts_E.sum())[:, None]


def make_plan(
    expert_ids_TK: Tensor,
    num_experts: int,
    slot_mask_TK: Tensor | None = None,
    num_rows: int | None = None,
) -> RowPlan:
    """Sorts the used slots by expert. With a GPU the CPU never waits.

    With a mask only the device knows how many slots are used. A plan on a GPU, or one that ``torch.compile``
    traces, is then padded to T*K rows; on a CPU the slots are counted.

    Args:
        expert_ids_TK: ``[T, K]`` int64 in ``[0, E)``; ignored where the slot is unused.
        num_experts: E.
        slot_mask_TK: ``[T, K]`` bool, False where a slot is unused. None: all are used.
        num_rows: Number of used slots, if the caller knows it. The plan is then not padded.

    Returns:
        The plan; R is T*K without a mask or with padding, else the number of used slots.

    Raises:
        IndexError, RuntimeError: An expert of a used slot does not exist; a GPU kernel traps instead.
        ValueError: `num_rows` is not the number of used slots; a GPU kernel traps where it is too small.
    """
    slots = expert_ids_TK.numel()
    is_padded = False
    if slot_mask_TK is None:
        assert num_rows in (None, slots), (num_rows, slots)
        num_rows = slots
    elif num_rows is None:
        is_padded = torch.compiler.is_compiling() or slot_mask_TK.device.type != "cpu"
        num_rows = slots if is_padded else int(slot_mask_TK.sum())
    slot_R, token_R, row_TK, counts_E = route(expert_ids_TK, slot_mask_TK, num_experts, num_rows)
    return RowPlan(token_R, slot_R, row_TK, counts_E, slot_mask_TK is not None, is_padded)


@torch.library.custom_op("graft::route", mutates_args=())
def route(
    expert_ids_TK: Tensor, slot_mask_TK: Tensor | None, num_experts: int, num_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns ``slot_R``, ``token_R``, ``row_TK`` and ``counts_E`` of a `RowPlan` with `num_rows` rows.

    Triton kernels compute them on NVIDIA GPUs, a sort elsewhere; the results are identical.
    """
    if _has_kernels(expert_ids_TK.device):
        mask_TK = None if slot_mask_TK is None else slot_mask_TK.contiguous()
        kernels = importlib.import_module("kernels.plan.triton_route")
        with torch.cuda.device(expert_ids_TK.device):
            found: tuple[Tensor, Tensor, Tensor, Tensor] = kernels.route(
                expert_ids_TK.contiguous(), mask_TK, num_experts, num_rows
            )
        return found
    return sorted_route(expert_ids_TK, slot_mask_TK, num_experts, num_rows)


@route.register_fake
def _route_shapes(
    expert_ids_TK: Tensor, slot_mask_TK: Tensor | None, num_experts: int, num_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    new = expert_ids_TK.new_empty
    return new(num_rows), new(num_rows), new(expert_ids_TK.shape), new(num_experts)


def sorted_route(
    expert_ids_TK: Tensor, slot_mask_TK: Tensor | None, num_experts: int, num_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the same by a stable sort, on any device."""
    T, K = expert_ids_TK.shape
    ids_N = expert_ids_TK.reshape(-1)
    bins = num_experts
    if slot_mask_TK is not None:
        # One expert past the last collects the unused slots at the end of the order.
        ids_N = ids_N.masked_fill(~slot_mask_TK.reshape(-1), num_experts)
        bins += 1
    slot_R = _stable_order(ids_N, num_experts)[:num_rows]
    # Without a mask there is no spare bin, so that scatter_add_ rejects an id out of range.
    counts = torch.zeros(bins, dtype=torch.int64, device=ids_N.device)
    counts.scatter_add_(0, ids_N, torch.ones_like(ids_N))
    row_R = torch.arange(num_rows, device=ids_N.device)
    if slot_mask_TK is not None:
        if ids_N.device.type == "cpu":
            _check_counts(counts, slot_mask_TK, num_rows)
        row_R = row_R.where(row_R < counts[:num_experts].sum(), num_rows)
    row_N = torch.full_like(ids_N, num_rows)
    row_N[slot_R] = row_R
    token_R = slot_R.clone() if K == 1 else torch.div(slot_R, K, rounding_mode="floor")
    return slot_R, token_R, row_N.view(T, K), counts[:num_experts]


def _check_counts(counts: Tensor, slot_mask_TK: Tensor, num_rows: int) -> None:
    used = int(slot_mask_TK.sum())
    if int(counts[-1]) != slot_mask_TK.numel() - used:
        raise IndexError(f"an expert id of a used slot is out of bounds: there are {len(counts) - 1} experts")
    if num_rows not in (used, slot_mask_TK.numel()):
        raise ValueError(f"a plan of {num_rows} rows, and {used} slots are used")


def _stable_order(ids_N: Tensor, num_experts: int) -> Tensor:
    if ids_N.device.type == "cpu" and num_experts <= _RADIX_SORTABLE_EXPERTS:
        return torch.from_numpy(ids_N.to(torch.int16).numpy().argsort(kind="stable"))
    return torch.argsort(ids_N, stable=True)


@cache
def _has_kernels(device: torch.device) -> bool:
    """Returns whether Triton kernels run there: an NVIDIA GPU from capability 8.0, and Triton installed."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    has_triton = importlib.util.find_spec("triton") is not None
    return has_triton and torch.cuda.get_device_capability(device) >= (8, 0)
