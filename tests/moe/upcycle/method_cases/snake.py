"""Experts of equal importance."""

from __future__ import annotations

from moe.upcycle.configs.snake_config import SnakeConfig
from tests.moe.upcycle.method_case import MethodCase

CASE = MethodCase(
    variants=(SnakeConfig(num_experts=6, num_shared=2), SnakeConfig(num_experts=4, importance="gradient")),
    sums=True,
    job={"router": "one_plus"},
)
