"""Expert parallelism under DeepSpeed: its groups, our dispatcher, and parameters marked as it expects.

As on the native engine, neighbouring ranks hold the slices of one copy of the experts.
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
    """Placement of the experts on ranks.

    Attributes:
        ranks: Number of ranks that together hold all experts.
        name: DeepSpeed's name of the group.
        group: These ranks; None if every rank holds all experts.
        counts: Number of experts E by parameter name, for parameters of which this rank holds a slice.
        rank: Rank of this process within the group.
    """

    ranks: int = 1
    name: str = ""
    group: ProcessGroup | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    rank: int = 0

    def place(self, name: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        """Returns the shape of the whole parameter, and the first row that this rank holds.

        Args:
            name: Name of the parameter.
            shape: Shape of this rank's slice, before ZeRO splits it.
        """
        if name not in self.counts:
            return shape, 0
        return (self.counts[name], *shape[1:]), self.rank * shape[0]


def apply_ep(model: HFModel, ranks: int) -> DeepSpeedEP:
    """Shards the experts of every layer, and sends their tokens by all-to-all. Collective.

    Args:
        model: Model whose parameters have no memory yet.
        ranks: Number of ranks to shard over; it divides the number of experts and the number of all ranks.
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
        counts[name], count = len(whole), len(whole) // ranks
        part: Any = nn.Parameter(whole.data[:count], whole.requires_grad)
        part.allreduce, part.group_name = False, group_name
        # These make ZeRO-3 split a slice over the ranks that hold the same one, and over no others.
        part.ds_zero_placement_family = "autoep_expert"
        part.ds_zero_partition_group_name = group_name
        setattr(experts, name, part)
    return counts


def gather_slices(part: Tensor, ep: DeepSpeedEP) -> Tensor:
    """Returns all experts, gathered from the slices of a group. Collective."""
    parts = [torch.empty_like(part) for _ in range(ep.ranks)]
    torch.distributed.all_gather(parts, part.contiguous(), group=ep.group)
    return torch.cat(parts)
