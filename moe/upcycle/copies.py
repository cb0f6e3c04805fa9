"""Sparse upcycling: every expert is a copy of the dense feed-forward network (arXiv 2212.05055).

Exact at step 0 for any router whose combine weights sum to 1, since ``sum_k w_k f(x) = f(x)``.

Letters: D model width, E experts, F width, U = 2F when gated, else F.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from moe.routers.base import Router
from moe.upcycle.base import UpcycleConfig, UpcycleMethod
from moe.upcycle.weights import ExpertBank, FFNWeights


@dataclass(frozen=True)
class CopyConfig(UpcycleConfig):
    """Config of `Copy`."""

    name: Literal["copy"] = "copy"
    noise_std: float = 0.0
    """Standard deviation of Gaussian noise on each copy, as a share of the standard deviation of the
    weight matrix. 0 keeps the copies identical and the function exact."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise_std < 0:
            raise ValueError(f"noise_std={self.noise_std}: a deviation is not negative. Set it to 0 or more.")


class Copy(UpcycleMethod[CopyConfig]):
    """E copies of the dense network, optionally with noise."""

    name = "copy"
    config_class = CopyConfig

    def is_exact(self, router: Router[Any]) -> bool:
        """Exact without noise, under weights that sum to 1."""
        return self.config.noise_std == 0 and router.weights_sum_to_one

    def build(self, ffn: FFNWeights, generator: Generator) -> ExpertBank:
        """Stacks the copies."""
        up_UD, b_up_U = ffn.up_FD, ffn.b_up_F
        if ffn.gate_FD is not None:
            up_UD = torch.cat([ffn.gate_FD, ffn.up_FD])
            if ffn.b_gate_F is not None and b_up_U is not None:
                b_up_U = torch.cat([ffn.b_gate_F, b_up_U])
        w_up_EUD, w_down_EDF = self._copies(up_UD), self._copies(ffn.down_DF)
        # Gate and up are stacked, but each has a deviation of its own.
        for matrix_E in (*w_up_EUD.chunk(1 if ffn.gate_FD is None else 2, dim=1), w_down_EDF):
            self._add_noise(matrix_E, generator)
        return ExpertBank(
            w_up_EUD=w_up_EUD,
            w_down_EDF=w_down_EDF,
            activation=ffn.activation,
            gated=ffn.gate_FD is not None,
            b_up_EU=None if b_up_U is None else self._copies(b_up_U),
            b_down_ED=None if ffn.b_down_D is None else self._copies(ffn.b_down_D),
        )

    def _copies(self, weight: Tensor) -> Tensor:
        # Contiguous: copies that share storage would train as one, and safetensors refuses them.
        return weight.detach().expand(self.config.num_experts, *weight.shape).contiguous()

    def _add_noise(self, matrix_E: Tensor, generator: Generator) -> None:
        if self.config.noise_std == 0:
            return
        noise_E = torch.randn(matrix_E.shape, generator=generator, dtype=torch.float32)
        matrix_E += noise_E.to(matrix_E) * (self.config.noise_std * matrix_E[0].std())
