"""COMET: soft, half hard and hard trees (the contract's parameters are 30 times the initial ones)."""

from __future__ import annotations

from moe.routers.configs.comet_config import CometConfig
from tests.moe.routers.router_case import RouterCase

CASE = RouterCase(
    variants=(
        CometConfig(gamma=100.0, entropy_coef=0.0),
        CometConfig(top_k=1, entropy_coef=3.0),
        CometConfig(top_k=4, gamma=0.1),
    ),
    excused={"relabelling": "experts that share a subtree share the tests on the way to it"},
)
