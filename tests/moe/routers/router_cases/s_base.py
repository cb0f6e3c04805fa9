"""S-BASE."""

from __future__ import annotations

from moe.routers.configs.s_base_config import SBaseConfig
from tests.moe.routers.router_case import RouterCase

CASE = RouterCase(variants=(SBaseConfig(top_k=2), SBaseConfig(top_k=4), SBaseConfig(iterations=20)))
