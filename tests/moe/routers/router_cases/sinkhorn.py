"""Megatron-core's Sinkhorn routing."""

from __future__ import annotations

from moe.routers.configs.sinkhorn_config import SinkhornConfig
from tests.moe.routers.router_case import RouterCase

CASE = RouterCase(
    variants=(SinkhornConfig(top_k=1), SinkhornConfig(top_k=4), SinkhornConfig(max_iterations=3))
)
