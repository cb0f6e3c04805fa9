"""Sigma-MoE-Tiny's router."""

from __future__ import annotations

from moe.routers.configs.sigma_config import SigmaConfig
from tests.moe.routers.router_case import RouterCase

CASE = RouterCase(variants=(SigmaConfig(top_k=2, temperature=1.0, top1_coef=1.0), SigmaConfig(top1_coef=0.0)))
