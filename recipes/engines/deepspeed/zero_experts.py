"""Expert parallelism under DeepSpeed: its groups, our dispatcher, and parameters marked as it expects.

The ranks form the grid of the native engine: neighbours hold the slices of one copy of the experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from moe.dispatch.all_to_all import AllToAllDispatcher
from moe.experts.experts import Experts
from moe.layer import moe_layers
from recipes.models.hf.hf_model import HFModel

EXPERT_GROUPS = ("experts", "expert_biases")


@dataclass(frozen=True)
class DeepSpeedEP:
    """How experts are spread over ranks.

    Attributes:
        ranks: Over how many.
        name: Of the group, as DeepSpeed has it.
        group: The ranks that hold a copy of all experts between them; None where every rank holds all.
        counts: Parameter name to E, for those of which this rank holds a slice.
        rank: Of this process within the group.
    """

    ranks: int = 1
    name: str = ""
    group: ProcessGroup | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    rank: int = 0

    def place(self, name: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        """The shape of a whole parameter, and the row of it with which this rank's begins.

        Args:
            name: Of the parameter.
            shape: Of what this rank holds before ZeRO cuts it.
        """
        if name not in self.counts:
            return shape, 0
        return (self.counts[name], *shape[1:]), self.rank * shape[0]


def apply_ep(model: HFModel, ranks: int) -> DeepSpeedEP:
    """Leaves each rank its slice of every layer's experts, and lets the tokens travel. Collective.

    Args:
        model: Whose parameters have no memory yet.
        ranks: Over how many; a divisor of the number of experts and of all ranks.
    """
    if ranks == 1:
        return DeepSpeedEP()
    from deepspeed.utils import groups

    name = f"ep_size_{ranks}"
    groups._create_expert_and_data_parallel(ranks)
    group = groups._get_expert_parallel_group(name)
    rank: int = groups._get_expert_parallel_rank(name)
    counts = {}
    for site, layer in moe_layers(model.module):
        found = _take_slice(layer.experts, ranks, name)
        counts |= {f"{site}.experts.{key}": count for key, count in found.items()}
        layer.set_dispatcher(AllToAllDispatcher(layer.router.num_experts, group))
    return DeepSpeedEP(ranks, name, group, counts, rank)


def _take_slice(experts: Experts, ranks: int, group_name: str) -> dict[str, int]:
    counts = {}
    experts.ranks = ranks
    for name, whole in list(experts.named_parameters()):
        counts[name], held = len(whole), len(whole) // ranks
        part: Any = nn.Parameter(whole.data[:held], whole.requires_grad)
        part.allreduce, part.group_name = False, group_name
        # By these ZeRO-3 cuts a slice over the ranks that hold the same one, and no others.
        part.ds_zero_placement_family = "autoep_expert"
        part.ds_zero_partition_group_name = group_name
        setattr(experts, name, part)
    return counts


def gather_slices(part: Tensor, spread: DeepSpeedEP) -> Tensor:
    """All experts from the slices of a group. Collective."""
    parts = [torch.empty_like(part) for _ in range(spread.ranks)]
    torch.distributed.all_gather(parts, part.contiguous(), group=spread.group)
    return torch.cat(parts)
