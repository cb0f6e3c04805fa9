"""BASE layers."""

from __future__ import annotations

from moe.routers.configs.base_layers_config import BaseLayersConfig
from tests.moe.routers.router_case import RouterCase

CASE = RouterCase(variants=(BaseLayersConfig(max_rounds=1), BaseLayersConfig(max_rounds=0)))
