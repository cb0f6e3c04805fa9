"""Mutual choice."""

from __future__ import annotations

from moe.routers.configs.mutual_choice_config import MutualChoiceConfig
from tests.moe.routers.router_case import RouterCase

CASE = RouterCase(
    variants=(
        MutualChoiceConfig(top_k=1, score="sigmoid", at_least_one=False),
        MutualChoiceConfig(top_k=3, balance_coef=0.0),
    )
)
