"""Skywork-MoE's routing."""

from __future__ import annotations

from moe.routers.configs.skywork_config import SkyworkConfig
from tests.moe.routers.router_case import RouterCase

CASE = RouterCase(
    variants=(
        SkyworkConfig(adaptive=False, z_coef=0.1, balance_scope="global_batch", logit_scale=2.0),
        SkyworkConfig(balance_form="switch", balance_scope="micro_batch"),
        SkyworkConfig(renormalise=False, top_k=1, momentum=0.5, capacity_factor=1.25),
        SkyworkConfig(balance_coef=0.0, top_k=4, bias=False),
        SkyworkConfig(momentum=0.0, balance_coef_max=1.0, balance_scope="sequence"),
    )
)
