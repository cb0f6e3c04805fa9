"""Soft MoE."""

from __future__ import annotations

from moe.routers.configs.soft_moe_config import SoftMoEConfig
from tests.moe.routers.router_case import RouterCase

CASE = RouterCase(variants=(SoftMoEConfig(slots_per_expert=1), SoftMoEConfig(slots_per_expert=3)))
