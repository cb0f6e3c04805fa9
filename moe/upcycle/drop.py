"""Drop-Upcycling: copies in which some neurons are drawn anew (arXiv 2502.19261).

A share of each expert's neurons gets fresh weights from a normal distribution with the dense matrix's mean
and deviation, so that experts differ from the first step on. The paper draws one set of neurons for the three
matrices of an expert: that is the default here. The experiments drew a separate set for each matrix, as its
author says and as the released code (``conversions/drop_upcycling.py``) does, which also permutes the neurons
and uses mean and deviation of the replaced weights: at a ratio of 0.5 an eighth of the neurons then stays
whole, instead of half. That is ``independent: true``.

Letters: F width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe.routers.base import Router
from moe.upcycle.base import UpcycleMethod
from moe.upcycle.configs.drop_config import DropConfig
from moe.upcycle.dense_shape import FFNShape, Matrix
from moe.upcycle.layer_plan import Drawn, Draws, ExpertPlan, LayerPlan, Moments, Noise


class Drop(UpcycleMethod[DropConfig]):
    """Method that copies the network and changes a share of each copy's neurons."""

    name = "drop"
    config_class = DropConfig

    def is_exact(self, router: Router[Any]) -> bool:
        """Returns True only if nothing changes, as for copies."""
        return self.config.ratio == 0 and router.weights_sum_to_one

    def plan(self, shape: FFNShape, draws: Draws, statistics: Mapping[str, Tensor]) -> LayerPlan:
        """Puts every neuron into every expert, some of them changed."""
        return LayerPlan(tuple(self._expert(shape, draws, e) for e in range(self.config.num_experts)))

    def _expert(self, shape: FFNShape, draws: Draws, expert: int) -> ExpertPlan:
        F = shape.width
        generator = draws.generator("drop", expert)
        count = int(self.config.ratio * F)
        if self.config.independent:
            neurons_F: slice | Tensor = torch.randperm(F, generator=generator)
            where: dict[Matrix, Tensor] = {
                matrix: torch.randperm(F, generator=generator)[:count] for matrix in shape.matrices
            }
        else:
            neurons_F = slice(0, F)
            where = dict.fromkeys(shape.matrices, torch.randperm(F, generator=generator)[:count])
        if count == 0:
            return ExpertPlan(F, neurons_F)
        if self.config.change == "noise":
            noise = Noise(self.config.noise_std, relative=False, positions=where)
            return ExpertPlan(F, neurons_F, noise=noise)
        moments: Moments = "slice" if self.config.independent else "matrix"
        return ExpertPlan(F, neurons_F, drawn=Drawn(where, moments=moments))
