"""Replicate, shuffle, slice, reinitialise: Qwen's fine-grained experts (Qwen2 report, arXiv 2407.10671).

The dense network is replicated until there are enough neurons, each replica is shuffled, the row of all of
them is cut into experts, and what is left over is discarded. Then half of each expert is drawn anew.

Reconstructed, as the report does not say: which half (neurons, one set for the three matrices) and out of
which distribution (normal, with mean and deviation of the dense matrix), both as in Drop-Upcycling.

Letters: E experts, F width of the dense network or of an expert, N neurons of all replicas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moe.errors import Mistake, require
from moe.routers.base import Router, RouterConfig
from moe.upcycle.base import UpcycleConfig, UpcycleMethod
from moe.upcycle.layer_plan import Drawn, Draws, ExpertPlan, FFNShape, LayerPlan


@dataclass(frozen=True)
class ShuffleSliceConfig(UpcycleConfig):
    """Config of `ShuffleSlice`."""

    name: Literal["shuffle_slice"] = "shuffle_slice"
    expert_width: int | None = None
    """F of an expert, at most the dense network's; None takes half of that."""
    ratio: float = 0.5
    """Share of each expert's neurons that are drawn anew."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            (
                self.expert_width is None or self.expert_width >= 1,
                "expert_width",
                "must be at least 1",
                "Or leave it at null.",
            ),
            (0 <= self.ratio <= 1, "ratio", "it is a share of the neurons", "Set it from 0 to 1."),
        )


class ShuffleSlice(UpcycleMethod[ShuffleSliceConfig]):
    """Slices of shuffled replicas, part of them drawn anew."""

    name = "shuffle_slice"
    config_class = ShuffleSliceConfig

    def is_exact(self, router: Router[Any]) -> bool:
        """Never: a token sees some neurons twice, others not at all, and drawn ones."""
        return False

    def check(self, router: RouterConfig, shape: FFNShape | None) -> list[Mistake]:
        """Experts no wider than the dense network."""
        return [] if shape is None else width_faults(self.config.expert_width, shape)

    def plan(self, shape: FFNShape, draws: Draws, statistics: Mapping[str, Tensor]) -> LayerPlan:
        """Expert e is the e-th run of the replicas' neurons."""
        F = self.config.expert_width or max(1, shape.width // 2)
        replicas = math.ceil(self.config.num_experts * F / shape.width)
        shuffled = [
            torch.randperm(shape.width, generator=draws.generator("shuffle", replica))
            for replica in range(replicas)
        ]
        neurons_N = torch.cat(shuffled)
        count = int(self.config.ratio * F)
        experts = []
        for e in range(self.config.num_experts):
            where_F = torch.randperm(F, generator=draws.generator("redraw", e))[:count]
            drawn = Drawn(dict.fromkeys(shape.matrices, where_F)) if count else None
            experts.append(ExpertPlan(F, neurons_N[e * F : (e + 1) * F], drawn=drawn))
        return LayerPlan(tuple(experts))


def width_faults(expert_width: int | None, shape: FFNShape) -> list[Mistake]:
    """Experts that are cut out of a dense network are no wider than it."""
    if expert_width is None or expert_width <= shape.width:
        return []
    rule = f"the dense network has {shape.width} neurons, and an expert takes some of them"
    return [Mistake("upcycle.expert_width", expert_width, rule, f"Set {shape.width} or less, or null.")]
