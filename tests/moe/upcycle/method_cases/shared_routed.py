"""Shared and routed experts."""

from __future__ import annotations

import torch
from torch import Tensor

from moe.experts.weights import FFNWeights
from moe.upcycle.configs.shared_routed_config import SharedRoutedConfig
from tests.moe.upcycle.method_case import MethodCase


def _rates(ffn: FFNWeights) -> dict[str, Tensor]:
    return {"activation_rate_F": torch.rand(ffn.width, generator=torch.Generator().manual_seed(9))}


CASE = MethodCase(
    variants=(SharedRoutedConfig(order="activation_rate"), SharedRoutedConfig(granularity=2, num_shared=1)),
    statistics=_rates,
    exact=True,
)
