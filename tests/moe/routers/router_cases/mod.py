"""Mixture of Depths."""

from __future__ import annotations

from moe.routers.configs.mod_config import MoDConfig
from tests.moe.routers.router_case import RouterCase

CASE = RouterCase(
    variants=(
        MoDConfig(top_k=2, capacity=0.5, gate="sigmoid"),
        MoDConfig(capacity=1.0, balance_coef=0.0),
    ),
    trained_by_losses=frozenset({"predictor_D", "predictor_bias"}),
)
