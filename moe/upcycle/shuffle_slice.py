"""Replicate, shuffle, slice, reinitialise: Qwen's fine-grained experts (Qwen2 report, arXiv 2407.10671).

The dense network is replicated until there are enough neurons, each replica is shuffled, their concatenation
is cut into experts, and the remainder is discarded. Then half of each expert is drawn anew.

Reconstructed, as the report does not say: the half (one set of neurons for the three matrices) and the
distribution (normal, with mean and deviation of the dense matrix), both as in Drop-Upcycling.

Letters: E experts, F width of the dense network or of an expert, N neurons of all replicas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe.routers.base import Router
from moe.upcycle.base import UpcycleMethod
from moe.upcycle.configs.shuffle_slice_config import ShuffleSliceConfig
from moe.upcycle.dense_shape import FFNShape
from moe.upcycle.layer_plan import Drawn, Draws, ExpertPlan, LayerPlan


class ShuffleSlice(UpcycleMethod[ShuffleSliceConfig]):
    """Method that slices shuffled replicas and draws a part of them anew."""

    name = "shuffle_slice"
    config_class = ShuffleSliceConfig

    def is_exact(self, router: Router[Any]) -> bool:
        """Returns False: a token sees some neurons twice, others not at all, and drawn ones."""
        return False

    def plan(self, shape: FFNShape, draws: Draws, statistics: Mapping[str, Tensor]) -> LayerPlan:
        """Takes expert e from the e-th run of the replicas' neurons."""
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
