"""Avg-K."""

from __future__ import annotations

from moe.routers.configs.avg_k_config import AvgKConfig
from moe.upcycle.configs.copies_config import CopyConfig
from tests.moe.routers.router_case import RouterCase

CASE = RouterCase(
    variants=(AvgKConfig(weights="softmax"), AvgKConfig(top_k=1, normalise=True)),
    method=CopyConfig(num_experts=4, noise_std=0.1),
)
