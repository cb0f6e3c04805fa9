"""Selective Sinkhorn Routing. Plans with detached potentials or no gradient, and noise: its own tests."""

from __future__ import annotations

from moe.routers.configs.ssr_config import SSRConfig
from tests.moe.routers.router_case import RouterCase

CASE = RouterCase(
    variants=(
        SSRConfig(top_k=1),
        SSRConfig(top_k=4),
        SSRConfig(probability=1.0, gradient="unrolled", max_iterations=30),
        SSRConfig(probability=1.0, gradient="unrolled", cost="linear", xi=1.0, draw_per="micro_batch"),
        SSRConfig(probability=1.0, gradient="unrolled", cost="linear", xi=1.0, top_k=1),
    )
)
