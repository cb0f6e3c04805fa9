"""CMoE's router."""

from __future__ import annotations

from moe.routers.configs.analytical_config import AnalyticalConfig
from tests.moe.routers.router_case import RouterCase

CASE = RouterCase(
    variants=(AnalyticalConfig(top_k=3, bias_rate=0.0, balance_coef=0.1),),
    # The weight is 1 + u p with u = 0: the rows move when u has.
    trained_by_losses=frozenset({"gate_ED", "up_ED"}),
)
