"""Between dense gates ``[T, E]`` with exact zeros and the slots of a `moe.types.Routing`.

Letters: T tokens, E experts, K slots a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.types import Routing


def slots_of_gates(gates_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Expert ids, weights and mask ``[T, K]`` of the gates that are not exactly 0.

    K is the largest number of experts that any of the tokens uses, not E: the plan sorts T*K slots and the
    combination walks over them, so that with hard gates both cost what top-k routing costs. To know K the
    host waits for the device once; planning masked slots waits as well.

    A gate that is exactly 0 has no expert to run and passes no gradient on, if it is a softmax or a product.
    """
    used_TE = gates_TE.detach() != 0
    slots = max(int(used_TE.sum(-1).max()), 1) if len(gates_TE) else 1
    ids_TK = gates_TE.detach().abs().topk(slots, dim=-1).indices
    return ids_TK, gates_TE.gather(-1, ids_TK), used_TE.gather(-1, ids_TK)


def gates_of_slots(routing: Routing) -> Tensor:
    """``[T, E]`` combine weights; 0 where a token does not use an expert. Unused slots do not count."""
    ids_TK, weights_TK = routing.expert_ids_TK, routing.weights_TK
    if routing.slot_mask_TK is not None:
        ids_TK = ids_TK.masked_fill(~routing.slot_mask_TK, 0)
        weights_TK = weights_TK.masked_fill(~routing.slot_mask_TK, 0)
    gates_TE = torch.zeros(len(ids_TK), routing.num_experts, dtype=weights_TK.dtype, device=weights_TK.device)
    return gates_TE.scatter_add(1, ids_TK, weights_TK)
