"""MoEfication."""

from __future__ import annotations

from moe.upcycle.configs.moefication_config import MoEficationConfig
from tests.moe.upcycle.method_case import MethodCase

CASE = MethodCase(
    variants=(MoEficationConfig(num_experts=4, split="cluster"),),
    sums=True,
    unsupported_reason="ReLU",
)
