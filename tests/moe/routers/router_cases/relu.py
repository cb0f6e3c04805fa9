"""ReLU routing."""

from __future__ import annotations

from moe.routers.configs.relu_config import ReLUConfig
from tests.moe.routers.router_case import RouterCase

CASE = RouterCase(
    variants=(
        ReLUConfig(penalty_init=1.0, top_k=1),
        ReLUConfig(penalty_init=0.1, penalty_by_load=False),
    )
)
