"""Quantile balancing, fixed and dynamic."""

from __future__ import annotations

from moe.routers.configs.quantile_config import QuantileConfig
from tests.moe.routers.router_case import RouterCase

CASE = RouterCase(
    variants=(
        QuantileConfig(score="sigmoid", decay=0.0, iterations=1),
        QuantileConfig(top_k=1, renormalise=False),
        QuantileConfig(mode="dynamic", renormalise=False),
        QuantileConfig(mode="dynamic", score="sigmoid", select_by="scores", max_experts=3),
        QuantileConfig(mode="dynamic", top_k=1, select_by="scores", renormalise=False),
    )
)
