"""Which routed row belongs to which expert, and how to get back: the index that every back end shares.

Letters: T tokens, E experts, K slots a token, R routed rows (one for each used token-expert pair).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# numpy sorts 16-bit integers by radix, 15 times faster than torch's comparison sort (T*K = 16k, E = 64).
_RADIX_SORTABLE_EXPERTS = 2**15 - 1


@dataclass(frozen=True)
class RowPlan:
    """The routed rows in expert order. Rows of one expert are contiguous and keep token order.

    Attributes:
        token_R: ``[R]`` int64, the token that each routed row is a copy of.
        slot_R: ``[R]`` int64, the flat slot ``t * K + k`` that each routed row came from.
        row_TK: ``[T, K]`` int64, the routed row of each slot; unused slots hold R.
        counts_E: ``[E]`` int64 rows of each expert, on the device of the ids.
        has_unused: Whether some slot may be unused, so that ``row_TK`` may hold R.
    """

    token_R: Tensor
    slot_R: Tensor
    row_TK: Tensor
    counts_E: Tensor
    has_unused: bool

    @property
    def num_rows(self) -> int:
        """R."""
        return self.token_R.shape[0]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.counts_E.shape[0]


def _stable_order(ids_N: Tensor, num_experts: int) -> Tensor:
    if ids_N.device.type == "cpu" and num_experts <= _RADIX_SORTABLE_EXPERTS:
        return torch.from_numpy(ids_N.to(torch.int16).numpy().argsort(kind="stable"))
    return torch.argsort(ids_N, stable=True)


def make_plan(expert_ids_TK: Tensor, num_experts: int, slot_mask_TK: Tensor | None = None) -> RowPlan:
    """Sorts the used slots by expert.

    Args:
        expert_ids_TK: ``[T, K]`` int64 in ``[0, E)``; ignored where the slot is unused.
        num_experts: E.
        slot_mask_TK: ``[T, K]`` bool, False where a slot is unused. None: all are used, and no
            host synchronisation happens on a GPU.

    Returns:
        The plan; R is T*K without a mask, and the number of used slots with one.
    """
    T, K = expert_ids_TK.shape
    ids_N = expert_ids_TK.reshape(-1)
    bins = num_experts
    if slot_mask_TK is not None:
        # One expert past the last collects the unused slots at the end of the order.
        ids_N = ids_N.masked_fill(~slot_mask_TK.reshape(-1), num_experts)
        bins += 1
    slot_N = _stable_order(ids_N, num_experts)
    # No bin to spare without a mask: scatter_add_ then refuses an id out of range.
    counts = torch.zeros(bins, dtype=torch.int64, device=ids_N.device)
    counts.scatter_add_(0, ids_N, torch.ones_like(ids_N))
    num_rows = T * K if slot_mask_TK is None else T * K - int(counts[num_experts])
    slot_R = slot_N[:num_rows]
    row_N = torch.full_like(ids_N, num_rows)
    row_N[slot_R] = torch.arange(num_rows, device=ids_N.device)
    return RowPlan(
        token_R=slot_R if K == 1 else torch.div(slot_R, K, rounding_mode="floor"),
        slot_R=slot_R,
        row_TK=row_N.view(T, K),
        counts_E=counts[:num_experts],
        has_unused=slot_mask_TK is not None,
    )
