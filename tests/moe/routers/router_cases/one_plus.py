"""Weights of 1 + logit."""

from __future__ import annotations

from moe.routers.configs.one_plus_config import OnePlusConfig
from tests.moe.routers.router_case import RouterCase

CASE = RouterCase(variants=(OnePlusConfig(top_k=3, balance_scope="sequence", z_coef=0.1),))
