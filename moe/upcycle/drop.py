"""Drop-Upcycling: copies part of whose neurons are drawn anew (arXiv 2502.19261).

A share of each expert's neurons gets fresh weights out of a normal distribution with mean and deviation of
the dense matrix, so that experts differ from the first step on. The paper draws one set of neurons for the
three matrices of an expert. The released code (``conversions/drop_upcycling.py``) also permutes the
neurons, draws a set for each matrix by itself, and takes mean and deviation of what it replaces: at a ratio
of 0.5 an eighth of the neurons then stays whole, instead of half.

Letters: F width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moe.errors import Mistake, require
from moe.routers.base import Router, RouterConfig
from moe.upcycle.base import UpcycleConfig, UpcycleMethod
from moe.upcycle.layer_plan import Drawn, Draws, ExpertPlan, FFNShape, LayerPlan, Matrix, Moments, Noise


@dataclass(frozen=True)
class DropConfig(UpcycleConfig):
    """Config of `Drop`."""

    name: Literal["drop"] = "drop"
    ratio: float = 0.5
    """Share of each expert's neurons that change. 0.5 was best in the paper; 1 loses what was learned."""
    change: Literal["redraw", "noise"] = "redraw"
    """``redraw``: drawn anew. ``noise``: noise of `noise_std` is added, the paper's baseline."""
    noise_std: float = 0.02
    """Standard deviation of that noise."""
    independent: bool = False
    """Whether each matrix changes at neurons of its own, as in the released code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            (0 <= self.ratio <= 1, "ratio", "it is a share of the neurons", "Set it from 0 to 1."),
            (self.noise_std > 0, "noise_std", "there would be no noise", "Set it above 0."),
        )


class Drop(UpcycleMethod[DropConfig]):
    """Copies that differ in a share of their neurons."""

    name = "drop"
    config_class = DropConfig

    def is_exact(self, router: Router[Any]) -> bool:
        """Only where nothing changes, as with copies."""
        return self.config.ratio == 0 and router.weights_sum_to_one

    def check(self, router: RouterConfig, shape: FFNShape | None) -> list[Mistake]:
        """The ratio must amount to a neuron, or be 0."""
        if shape is None or self.config.ratio == 0 or int(self.config.ratio * shape.width):
            return []
        rule = f"of {shape.width} neurons that is not one"
        remedy = "Set a larger share, or 0 for copies."
        return [Mistake("upcycle.ratio", self.config.ratio, rule, remedy)]

    def plan(self, shape: FFNShape, draws: Draws, statistics: Mapping[str, Tensor]) -> LayerPlan:
        """Every neuron in every expert; some of them change."""
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
