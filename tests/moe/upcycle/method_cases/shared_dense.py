"""The dense network as shared expert."""

from __future__ import annotations

from moe.upcycle.configs.shared_dense_config import SharedDenseConfig
from tests.moe.upcycle.method_case import MethodCase

CASE = MethodCase(
    variants=(
        SharedDenseConfig(num_experts=4, expert_width=4),
        SharedDenseConfig(num_experts=4, routed="drawn", expert_width=4),
    ),
    exact=True,
)
