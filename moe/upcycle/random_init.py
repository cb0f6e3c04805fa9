"""Experts drawn anew: a mixture from scratch, the baseline that every upcycling method is measured against.

Letters: D model width, E experts, F width, U = 2F when gated, else F.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator

from moe.routers.base import Router
from moe.upcycle.base import UpcycleConfig, UpcycleMethod
from moe.upcycle.weights import ExpertBank, FFNWeights


@dataclass(frozen=True)
class RandomConfig(UpcycleConfig):
    """Config of `Random`."""

    name: Literal["random"] = "random"
    init_std: float = 0.02
    """Standard deviation of the weights."""
    expert_width: int | None = None
    """F of an expert; None takes the width of the dense network."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.init_std > 0:
            raise ValueError(
                f"init_std={self.init_std}: experts of zeros stay equal. Set it above 0; 0.02 is usual."
            )
        if self.expert_width is not None and self.expert_width < 1:
            raise ValueError(f"expert_width={self.expert_width} must be at least 1. Or leave it at null.")


class Random(UpcycleMethod[RandomConfig]):
    """Independent normal weights and zero biases; only shape and activation come from the dense network."""

    name = "random"
    config_class = RandomConfig

    def is_exact(self, router: Router[Any]) -> bool:
        """Never: it is another function."""
        return False

    def build(self, ffn: FFNWeights, generator: Generator) -> ExpertBank:
        """Draws the experts."""
        E, D = self.config.num_experts, ffn.model_width
        F = self.config.expert_width or ffn.width
        U = F if ffn.gate_FD is None else 2 * F
        like = ffn.up_FD
        return ExpertBank(
            w_up_EUD=self._draw((E, U, D), like, generator),
            w_down_EDF=self._draw((E, D, F), like, generator),
            activation=ffn.activation,
            gated=ffn.gate_FD is not None,
            b_up_EU=None if ffn.b_up_F is None else like.new_zeros(E, U),
            b_down_ED=None if ffn.b_down_D is None else like.new_zeros(E, D),
        )

    def _draw(self, shape: tuple[int, ...], like: torch.Tensor, generator: Generator) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * self.config.init_std).to(like)
