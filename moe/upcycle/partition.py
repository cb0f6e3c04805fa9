"""Experts that divide the dense neurons among them: no neuron twice, total parameters stay what they were.

With K of E experts a token computes ``K / E`` of the network: another function, that training has to
repair. LLaMA-MoE v1 (arXiv 2406.16554) found a random division best among its own and needed 200 billion
tokens; v2 (arXiv 2411.15708) takes runs of neighbours.

Letters: E experts, F width of the dense network or of an expert, K experts a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moe.errors import Mistake, require
from moe.routers.base import Router, RouterConfig
from moe.upcycle.base import UpcycleConfig, UpcycleMethod
from moe.upcycle.gates import Gates, observe
from moe.upcycle.layer_plan import Draws, ExpertPlan, FFNShape, LayerPlan, Matrix


@dataclass(frozen=True)
class PartitionConfig(UpcycleConfig):
    """Config of `Partition`."""

    name: Literal["partition"] = "partition"
    split: Literal["random", "contiguous"] = "random"
    """How neurons are dealt out: at random, or in runs."""
    scale_factor: float | None = None
    """Factor on the experts' output, folded into their down projections; None takes ``E / K`` as LLaMA-MoE.
    Where weights sum to 1, each of K experts then weighs about E / K^2; K makes it 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            (
                self.scale_factor is None or self.scale_factor > 0,
                "scale_factor",
                "experts that count nothing cannot learn",
                "Set it above 0.",
            ),
        )


class Partition(UpcycleMethod[PartitionConfig]):
    """Each dense neuron in one expert."""

    name = "partition"
    config_class = PartitionConfig

    def is_exact(self, router: Router[Any]) -> bool:
        """Only where every token uses every expert, and each counts 1."""
        gates = observe(router.config, router.num_experts)
        return is_whole(gates, router.num_experts, self._factor(gates))

    def check(self, router: RouterConfig, shape: FFNShape | None) -> list[Mistake]:
        """Experts of one width."""
        return [] if shape is None else division_faults(self.config.num_experts, shape)

    def plan(self, shape: FFNShape, draws: Draws, statistics: Mapping[str, Tensor]) -> LayerPlan:
        """Parts of one size."""
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
    """The plan of experts that divide the dense neurons, however the division was found.

    Args:
        parts: For each routed expert, ``[F]`` int64 its neurons; all of one length.
        scale_factor: Factor on the routed experts' output.
        gates: Of the router.
        shared_F: The neurons of the expert that every token uses; None for none.
    """
    # The dense bias counts once: with the shared expert, or over what the routed ones weigh together.
    bias = 0.0 if shared_F is not None else 1.0 / (gates.total or 1.0)
    scale: dict[Matrix, float] = {"down": scale_factor}
    experts = tuple(ExpertPlan(len(part), part, scale=scale, down_bias=bias) for part in parts)
    return LayerPlan(experts, None if shared_F is None else ExpertPlan(len(shared_F), shared_F))


def is_whole(gates: Gates, num_experts: int, scale_factor: float) -> bool:
    """Whether all experts of a division are used and count once each: it is the dense network then."""
    weighs_one = gates.alike is not None and abs(gates.alike * scale_factor - 1) < 1e-9
    return gates.top_k == num_experts and weighs_one


def division_faults(num_experts: int, shape: FFNShape) -> list[Mistake]:
    """The dense neurons must divide into parts of one size."""
    if shape.width % num_experts == 0:
        return []
    rule = f"the {shape.width} neurons of the dense network do not divide by it"
    return [Mistake("upcycle.num_experts", num_experts, rule, "Set a divisor.")]
