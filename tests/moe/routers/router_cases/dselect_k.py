"""DSelect-k. The static gate, which reads no token, stands in its own tests."""

from __future__ import annotations

from moe.routers.configs.dselect_k_config import DSelectKConfig
from tests.moe.routers.router_case import RouterCase

CASE = RouterCase(
    variants=(
        DSelectKConfig(gamma=100.0, entropy_coef=0.0),
        DSelectKConfig(top_k=4, gamma=0.1),
        DSelectKConfig(top_k=3, unreachable="penalise", penalty_coef=0.5),
    ),
    excused={"relabelling": "an expert's number is the code that selectors spell"},
)
