"""Replicate, shuffle, slice."""

from __future__ import annotations

from moe.upcycle.configs.shuffle_slice_config import ShuffleSliceConfig
from tests.moe.upcycle.method_case import MethodCase

CASE = MethodCase(
    variants=(
        ShuffleSliceConfig(num_experts=4, expert_width=6),
        ShuffleSliceConfig(num_experts=5, expert_width=7, ratio=0.0),
    )
)
