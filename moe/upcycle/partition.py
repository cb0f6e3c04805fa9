"""Experts that divide the dense neurons: no neuron twice, and the total parameters stay the same.

With K of E experts a token computes ``K / E`` of the network: another function, which training has to repair.
LLaMA-MoE v1 (arXiv 2406.16554) found a random division best among its own and needed 200 billion tokens; v2
(arXiv 2411.15708) takes runs of neighbours.

Letters: E experts, F width of the dense network or of an expert, K experts a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe.routers.base import Router
from moe.upcycle.base import UpcycleMethod
from moe.upcycle.configs.partition_config import PartitionConfig
from moe.upcycle.dense_shape import FFNShape, Matrix
from moe.upcycle.gates import Gates, observe
from moe.upcycle.layer_plan import Draws, ExpertPlan, LayerPlan


class Partition(UpcycleMethod[PartitionConfig]):
    """Method that puts each dense neuron into one expert."""

    name = "partition"
    config_class = PartitionConfig

    def is_exact(self, router: Router[Any]) -> bool:
        """Returns True only if every token uses every expert, at weight 1."""
        gates = observe(router.config, router.num_experts)
        return is_whole(gates, router.num_experts, self._factor(gates))

    def plan(self, shape: FFNShape, draws: Draws, statistics: Mapping[str, Tensor]) -> LayerPlan:
        """Cuts the neurons into parts of one size."""
        E = self.config.num_experts
        order_F = torch.arange(shape.width)
        if self.config.split == "random":
            order_F = torch.randperm(shape.width, generator=draws.generator("split"))
        return parts_plan(order_F.chunk(E), self._factor(self.gates), self.gates)

    def _factor(self, gates: Gates) -> float:
        return self.config.scale_factor or self.config.num_experts / gates.top_k


def parts_plan(
    parts: Sequence[Tensor], scale_factor: float, gates: Gates, shared_F: Tensor | None = None
) -> LayerPlan:
    """Makes the plan of experts that divide the dense neurons in a given way.

    Args:
        parts: ``[F]`` int64 neurons of each routed expert; all of one length.
        scale_factor: Factor on the routed experts' output.
        gates: Gates of the router.
        shared_F: Neurons of the expert that every token uses; None without one.
    """
    # The dense bias counts once: in the shared expert, or over the total weight of the routed ones.
    bias = 0.0 if shared_F is not None else 1.0 / (gates.total or 1.0)
    scale: dict[Matrix, float] = {"down": scale_factor}
    experts = tuple(ExpertPlan(len(part), part, scale=scale, down_bias=bias) for part in parts)
    return LayerPlan(experts, None if shared_F is None else ExpertPlan(len(shared_F), shared_F))


def is_whole(gates: Gates, num_experts: int, scale_factor: float) -> bool:
    """Returns True if all experts of a division are used at weight 1, i.e. equal the dense network."""
    weighs_one = gates.alike is not None and abs(gates.alike * scale_factor - 1) < 1e-9
    return gates.top_k == num_experts and weighs_one
