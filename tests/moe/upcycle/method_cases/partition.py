"""Divisions of the dense neurons."""

from __future__ import annotations

from moe.upcycle.configs.partition_config import PartitionConfig
from tests.moe.upcycle.method_case import MethodCase

CASE = MethodCase(
    variants=(
        PartitionConfig(num_experts=4, split="contiguous"),
        PartitionConfig(num_experts=4, scale_factor=4.0),
    )
)
