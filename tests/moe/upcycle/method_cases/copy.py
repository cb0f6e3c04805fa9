"""Copies."""

from __future__ import annotations

from moe.upcycle.configs.copies_config import CopyConfig
from tests.moe.upcycle.method_case import MethodCase

CASE = MethodCase(
    variants=(
        CopyConfig(num_experts=4, noise_std=0.1),
        CopyConfig(num_experts=2),
        CopyConfig(permute=True),
    ),
    exact=True,
)
